"""2:4 checkpoints for others: the state of torch's SparseSemiStructuredTensor, made on the CPU.

    config.json, tokenizer, ...       as in the checkpoint
    wandapp/torch-2of4.json           which linear maps are compressed, and why the others are not
    model-00001-of-00032.safetensors  per compressed linear map NAME:
        NAME.weight.packed            [out, in / 2]          kept weights
        NAME.weight.meta              [out, in / 16] int16   CUTLASS's metadata, bit-equal to torch's converter

`load_torch_24` reads it. On compute capability 8.x torch multiplies this form as it is; on 9.0 and later torch uses
cuSPARSELt, whose order is private to library and device, so there each weight is compressed again when it is loaded.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from wandapp.conversion import tensor_homes
from wandapp.devices import resolve_device, resolve_dtype
from wandapp.errors import WandappError
from wandapp.kernels.semi_structured import cutlass_layout
from wandapp.output import output_folder
from wandapp.packed import PackedCheckpoint
from wandapp.packing import Progress, copy_companions, pack_checkpoint, write_shards
from wandapp.shards import write_index
from wandapp.skeleton import fill_skeleton, skeleton
from wandapp.weight_files import TensorFiles, is_packed

STATE = "wandapp/torch-2of4.json"
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16}
_LIMITS = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]


class TorchState(BaseModel):
    """What `STATE` holds. left_dense: linear maps by the reason that they are not compressed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal["torch-2:4"] = "torch-2:4"
    version: Literal[1] = 1
    compressed: list[str]
    left_dense: dict[str, list[str]]


@dataclass
class ExportSummary:
    """What was written. left_dense: linear maps by reason. Bytes are those of all tensors, before and after."""

    compressed: int = 0
    left_dense: dict[str, list[str]] = field(default_factory=dict)
    dense_bytes: int = 0
    exported_bytes: int = 0


def export_torch_24(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ExportSummary:
    """Writes the 2:4 checkpoint `source`, packed or dense with zeros, into the new folder `out` for torch.

    dtype   float16 or bfloat16, where the checkpoint has float32
    raises  WandappError where there is nothing to compress
    """
    with tempfile.TemporaryDirectory() as scratch:
        packed = source
        if not is_packed(source):
            packed = Path(scratch) / "packed"
            pack_checkpoint(source, packed)
        checkpoint = PackedCheckpoint(packed)
        return _export(
            source, checkpoint, Path(out), None if dtype is None else resolve_dtype(dtype), overwrite, on_progress
        )


def _export(
    source: str | Path,
    checkpoint: PackedCheckpoint,
    out: Path,
    dtype: torch.dtype | None,
    overwrite: bool,
    on_progress: Progress | None,
) -> ExportSummary:
    summary = ExportSummary()
    compressed = _compressible(source, checkpoint, dtype, summary)
    if not compressed:
        reasons = "; ".join(f"{len(names)} {reason}" for reason, names in summary.left_dense.items())
        raise WandappError(f"{source}: no linear map can be compressed for torch ({reasons or 'it has none'})")
    groups: dict[Path, list[str]] = {}
    for tensor in checkpoint.tensors:
        groups.setdefault(checkpoint.path_of_tensor(tensor), []).append(tensor)
    with output_folder(out, overwrite, checkpoint.folder) as partial:
        copy_companions(checkpoint.folder, partial)
        shards = [_shard(groups[path], checkpoint, compressed, dtype, summary) for path in sorted(groups)]
        write_index(partial, write_shards(partial, "model", shards, on_progress))
        state = TorchState(compressed=sorted(compressed), left_dense=summary.left_dense)
        (partial / STATE).write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return summary


def _compressible(
    source: str | Path, checkpoint: PackedCheckpoint, dtype: torch.dtype | None, summary: ExportSummary
) -> set[str]:
    """Tensors of linear maps that torch's tensor can hold; the others go to the summary with the reason."""
    if str(checkpoint.pattern) != "2:4":
        raise WandappError(
            f"{source}: torch's sparse tensors are 2:4, this checkpoint is {checkpoint.pattern}; prune with --sparsity 2:4"
        )
    if checkpoint.storage != "same":
        raise WandappError(f"{source}: its weights are stored as {checkpoint.storage}; wandapp unpack it first")
    model = skeleton(checkpoint.folder, max_blocks=len(checkpoint.tensors))
    homes = tensor_homes(model, checkpoint.tensors)
    found = set()
    for tensor, linears in checkpoint.tensors.items():
        if not linears:
            continue
        rows, cols = linears[0].shape
        stored = dtype or getattr(torch, linears[0].dtype)
        reason = None
        if homes[tensor].expert is not None or linears[0].index is not None or linears[0].transposed:
            reason = "belong to no nn.Linear"
        elif not isinstance(model.get_submodule(homes[tensor].name.removesuffix(".weight")), nn.Linear):
            reason = "belong to no nn.Linear"
        elif stored.itemsize != 2:
            reason = f"are {linears[0].dtype}: give --dtype bfloat16 or float16"
        elif rows % _LIMITS.sparse_min_rows or cols % _LIMITS.sparse_min_cols:
            reason = f"have rows not divisible by {_LIMITS.sparse_min_rows} or columns not by {_LIMITS.sparse_min_cols}"
        if reason is None:
            found.add(tensor)
        else:
            summary.left_dense.setdefault(reason, []).append(tensor)
    summary.compressed = len(found)
    return found


def _shard(
    tensors: list[str],
    checkpoint: PackedCheckpoint,
    compressed: set[str],
    dtype: torch.dtype | None,
    summary: ExportSummary,
) -> Iterator[tuple[str, Tensor]]:
    for tensor in tensors:
        if tensor in compressed:
            packed = checkpoint.read_linear(checkpoint.tensors[tensor][0].name)
            values, metadata = cutlass_layout(packed._replace(values=packed.values.to(dtype or packed.values.dtype)))
            parts = {f"{tensor}.packed": values, f"{tensor}.meta": metadata}
            summary.dense_bytes += 2 * values.nbytes
        else:
            dense = checkpoint.read_tensor(tensor)
            parts = {tensor: dense.to(dtype) if dtype and dense.is_floating_point() else dense}
            summary.dense_bytes += parts[tensor].nbytes
        summary.exported_bytes += sum(part.nbytes for part in parts.values())
        yield from parts.items()


def load_torch_24(folder: str | Path, device: str = "cuda") -> nn.Module:
    """The transformers model of an exported folder, its compressed weights torch's sparse tensors.

    On the CPU the tensors can be looked at (`to_dense`) but torch does not multiply them there.
    raises  WandappError on a folder that is no export, or one that does not fit its config
    """
    folder, target = Path(folder), resolve_device(device)
    state = _read_state(folder / STATE)
    files = TensorFiles(sorted(folder.glob("*.safetensors")))
    parts = {f"{name}.{part}" for name in state.compressed for part in ("packed", "meta")}
    if missing := sorted(parts - files.infos.keys()):
        raise WandappError(f"{folder}: the export lacks {missing[0]}; export it again")
    dense = [name for name in files.infos if name not in parts]
    stored = files.infos[f"{state.compressed[0]}.packed"].dtype if state.compressed else ""
    if stored not in _STORED:
        raise WandappError(
            f"{folder}: compressed weights are float16 or bfloat16, got {stored or 'none'}; export it again"
        )
    dtype = _STORED[stored]
    model = skeleton(folder, dtype=dtype, max_blocks=len(files.infos))
    homes = tensor_homes(model, [*state.compressed, *dense])
    linears = {name: _linear_without_weight(model, homes[name].name, files, name) for name in state.compressed}
    fill_skeleton(model, folder, ((homes[name].name, files.read(name)) for name in dense))
    model.to(target)
    for name, linear in linears.items():
        packed, meta = (files.read(f"{name}.{part}").to(target, copy=True) for part in ("packed", "meta"))
        linear.weight = nn.Parameter(_sparse_tensor(packed, meta), requires_grad=False)
    return model


def _read_state(path: Path) -> TorchState:
    try:
        return TorchState.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error.error_count()} faults"
        raise WandappError(f"{path}: no export for torch ({reason}); make one with wandapp export") from None


def _linear_without_weight(model: nn.Module, weight: str, files: TensorFiles, name: str) -> nn.Linear:
    """The nn.Linear whose weight comes later, after a check of shapes and types; its weight is taken away."""
    try:
        linear = model.get_submodule(weight.removesuffix(".weight"))
    except AttributeError:
        linear = None
    shapes = files.infos[f"{name}.packed"].shape, files.infos[f"{name}.meta"].shape
    types = files.infos[f"{name}.packed"].dtype, files.infos[f"{name}.meta"].dtype
    rows, cols = tuple(linear.weight.shape) if isinstance(linear, nn.Linear) and linear.weight is not None else (0, 0)
    if not rows or shapes != ((rows, cols // 2), (rows, cols // 16)) or types[0] not in _STORED or types[1] != "I16":
        raise WandappError(
            f"{name}: {shapes} of {types} do not make a compressed weight of this model; export it again"
        )
    linear.weight = None
    return cast(nn.Linear, linear)


def _sparse_tensor(packed: Tensor, meta: Tensor) -> Tensor:
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    if packed.is_cuda and torch.cuda.get_device_capability(packed.device)[0] != 8:
        dense = sparse_semi_structured_to_dense_cutlass(packed, meta)
        return SparseSemiStructuredTensorCUSPARSELT(shape, torch._cslt_compress(dense), None, None, None, None)
    return SparseSemiStructuredTensorCUTLASS(shape, packed, meta, None, None, None)
