"""Packs a pruned checkpoint and restores it, block by block: neither way holds the dense model in memory."""

import ctypes
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wandapp.blocks import LinearView, find_blocks, find_linears
from wandapp.config import PruneConfig
from wandapp.errors import WandappError
from wandapp.kernels.pack import Packed, pack
from wandapp.models import PACKED_MANIFEST, checkpoint_files, module_names, output_folder, skeleton
from wandapp.packed import FORMAT, VERSION, Manifest, PackedCheckpoint, PackedLinear, TensorFiles
from wandapp.pattern import SparsityPattern

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_CARD_NOTE = (
    "\n> This folder holds the packed form, which `wandapp.load_sparse` and `wandapp generate` read; "
    "`wandapp unpack` restores the dense one.\n"
)


@dataclass
class PackSummary:
    """What packing or unpacking did. Bytes are those of all tensors; linear_* count the packed linear maps alone."""

    pattern: str
    linears: int = 0
    kept_dense: int = 0
    negative_zeros: int = 0
    dense_bytes: int = 0
    packed_bytes: int = 0
    linear_dense_bytes: int = 0
    linear_packed_bytes: int = 0

    def add_linears(self, count: int, dense_bytes: int, packed_bytes: int) -> None:
        self.linears += count
        self.dense_bytes += dense_bytes
        self.linear_dense_bytes += dense_bytes
        self.packed_bytes += packed_bytes
        self.linear_packed_bytes += packed_bytes

    def add_dense(self, tensor: Tensor) -> None:
        self.kept_dense += 1
        self.dense_bytes += tensor.nbytes
        self.packed_bytes += tensor.nbytes


Progress = Callable[[int, int], None]


def pack_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    sparsity: str | SparsityPattern | None = None,
    skip: tuple[str, ...] | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> PackSummary:
    """Packs the pruned checkpoint in folder `source` into the new folder `out`; returns the sizes.

    sparsity, skip   what was pruned; None: what the folder's wandapp/recipe.yaml says
    on_progress      called with (files written, files in all)
    raises           WandappError, and TooManyNonZerosError where a linear map does not hold the pattern
    """
    source = Path(source)
    pattern, skip = _what_was_pruned(source, sparsity, skip)
    files = TensorFiles(checkpoint_files(source))
    plan = _Plan.of(source, files, pattern, skip)
    summary = PackSummary(str(pattern))
    names = [f"packed-{index:05}-of-{len(plan.groups):05}.safetensors" for index in range(1, len(plan.groups) + 1)]
    with output_folder(out, overwrite) as partial:
        _copy_companions(source, partial)
        _add_recipe(partial, pattern, skip)
        for done, (name, group) in enumerate(zip(names, plan.groups, strict=True), start=1):
            _save(_packed_group(group, plan, files, pattern, summary), partial / name)
            if on_progress:
                on_progress(done, len(names))
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            pattern=str(pattern),
            files=names,
            linears=plan.entries,
            dense=plan.dense,
        )
        (partial / PACKED_MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return summary


def prunable_tensors(
    folder: Path, names: Iterable[str], skip: tuple[str, ...]
) -> tuple[torch.nn.Module, dict[str, str], dict[str, list[LinearView]]]:
    """What config.json makes of the tensors `names` of a dense checkpoint.

    returns  (skeleton, checkpoint's tensor by its name inside the model, linear maps in the decoder blocks by tensor)
    """
    names = list(names)
    model = skeleton(folder, max_blocks=len(names))
    tensor_of = {inside: tensor for tensor, inside in module_names(model, names).items()}
    if None in tensor_of:
        raise WandappError(
            f"{folder}: weights that the model merges, such as the experts of {tensor_of[None]}, cannot be packed; "
            "keep this checkpoint dense"
        )
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    views: dict[str, list[LinearView]] = {}
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name, view in find_linears(block, f"{prefix}.{index}", skip).items():
            tensor = tensor_of.get(parameters[id(view.parameter)])
            if tensor is None:
                raise WandappError(f"{folder}: the checkpoint has no tensor for {name}; prune and save it again")
            if not any(re.search(expression, name) for expression in skip):
                views.setdefault(tensor, []).append(view)
    return model, tensor_of, views


@dataclass
class _Plan:
    """Which tensors become packed linear maps (views by tensor), which stay dense, and what lies in which file."""

    views: dict[str, list[LinearView]]
    groups: list[list[str]]
    entries: list[PackedLinear] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: Path, files: TensorFiles, pattern: SparsityPattern, skip: tuple[str, ...]) -> "_Plan":
        model, tensor_of, views = prunable_tensors(source, files.infos, skip)
        for tensor, its_views in views.items():
            found, expected = files.infos[tensor].shape, tuple(its_views[0].parameter.shape)
            if found != expected:
                raise WandappError(f"{source}: {tensor} has shape {list(found)}, config.json asks for {list(expected)}")
            pattern.require_fit(its_views[0].name, its_views[0].weight.shape[1])
        groups: dict[int, list[str]] = {}
        prefix = re.escape(find_blocks(model)[0])
        for inside, tensor in _without_ties(model, tensor_of, files).items():
            block = re.match(rf"{prefix}\.(\d+)\.", inside)
            groups.setdefault(int(block[1]) if block else -1, []).append(tensor)
        return cls(views, [groups[index] for index in sorted(groups)])


def _without_ties(model: torch.nn.Module, tensor_of: dict[str, str], files: TensorFiles) -> dict[str, str]:
    """tensor_of without the second name of a tied weight, where the checkpoint stores an equal copy under it."""
    tied = {second: first for second, first in getattr(model, "all_tied_weights_keys", {}).items()}
    return {
        inside: tensor
        for inside, tensor in tensor_of.items()
        if tied.get(inside) not in tensor_of or not torch.equal(files.read(tensor), files.read(tensor_of[tied[inside]]))
    }


def _packed_group(
    tensors: list[str], plan: _Plan, files: TensorFiles, pattern: SparsityPattern, summary: PackSummary
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, under the names they are stored by."""
    for tensor in tensors:
        stored = files.read(tensor)
        if tensor not in plan.views:
            plan.dense.append(tensor)
            summary.add_dense(stored)
            yield tensor, stored
            continue
        for view in plan.views[tensor]:
            weight = view.of(stored)  # [out, in]
            packed = _pack_view(view.name, weight, pattern)
            summary.add_linears(1, weight.nbytes, sum(part.nbytes for part in packed[:3] if part is not None))
            summary.negative_zeros += _count_negative_zeros(weight)
            name = tensor.removesuffix(".weight") if view.index is None else f"{tensor}.{view.index}"
            entry = PackedLinear(
                name=name,
                tensor=tensor,
                shape=packed.shape,
                dtype=str(weight.dtype).removeprefix("torch."),
                transposed=view.transposed,
                index=view.index,
            )
            plan.entries.append(entry)
            yield from ((name, part) for name, part in zip(entry.parts, packed[:3], strict=True) if part is not None)


def _pack_view(name: str, weight: Tensor, pattern: SparsityPattern) -> Packed:
    try:
        return pack(weight, n=pattern.n, m=pattern.m)
    except WandappError as error:
        raise WandappError(f"{name}: {error}") from error


def _count_negative_zeros(weight: Tensor) -> int:
    bits = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
    return int(torch.count_nonzero(bits == torch.iinfo(bits.dtype).min))  # the sign bit alone


def _save(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """One file, whose tensors are dropped with the end of this function; glibc would keep their memory for later."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _what_was_pruned(source: Path, sparsity, skip) -> tuple[SparsityPattern, tuple[str, ...]]:
    recipe_file = source / "wandapp" / "recipe.yaml"
    if sparsity is None and not recipe_file.is_file():
        raise WandappError(
            f"{source}: no wandapp/recipe.yaml says what was pruned; give --sparsity, e.g. --sparsity 2:4"
        )
    recipe = PruneConfig.from_yaml(recipe_file) if recipe_file.is_file() else None
    pattern = SparsityPattern.parse(recipe.sparsity if sparsity is None else sparsity)
    return pattern, tuple((recipe.skip if recipe else ()) if skip is None else skip)


def _add_recipe(folder: Path, pattern: SparsityPattern, skip: tuple[str, ...]) -> None:
    """Where the checkpoint came without a recipe: what was pruned, so that verify and unpack know."""
    recipe = folder / "wandapp" / "recipe.yaml"
    if not recipe.is_file():
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(json.dumps({"sparsity": str(pattern), "skip": list(skip)}) + "\n", encoding="utf-8")


def _copy_companions(source: Path, target: Path) -> None:
    """Copies config, tokenizer, recipe and whatever else is no weight file."""
    for path in sorted([*source.iterdir(), *(source / "wandapp").glob("*")]):
        place = path.relative_to(source)
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and place != Path(PACKED_MANIFEST):
            (target / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / place)
    card = target / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        packed = (source / PACKED_MANIFEST).is_file()
        card.write_text(text.removesuffix(_CARD_NOTE) if packed else text + _CARD_NOTE, encoding="utf-8")


def unpack_checkpoint(
    packed: str | Path, out: str | Path, *, overwrite: bool = False, on_progress: Progress | None = None
) -> PackSummary:
    """Writes the dense checkpoint that was packed, bit for bit, into the new folder `out`; returns the sizes."""
    checkpoint = PackedCheckpoint(packed)
    summary = PackSummary(str(checkpoint.pattern))
    groups: dict[Path, list[str]] = {}
    for tensor in checkpoint.tensors:
        groups.setdefault(checkpoint.path_of_tensor(tensor), []).append(tensor)
    weight_map: dict[str, str] = {}
    with output_folder(out, overwrite) as partial:
        _copy_companions(checkpoint.folder, partial)
        for done, path in enumerate(sorted(groups), start=1):
            name = f"model-{done:05}-of-{len(groups):05}.safetensors"
            _save(_unpacked_group(groups[path], checkpoint, summary), partial / name)
            weight_map |= dict.fromkeys(groups[path], name)
            if on_progress:
                on_progress(done, len(groups))
        index = {"metadata": {"total_size": summary.dense_bytes}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return summary


def _unpacked_group(
    tensors: list[str], checkpoint: PackedCheckpoint, summary: PackSummary
) -> Iterator[tuple[str, Tensor]]:
    for tensor in tensors:
        dense = checkpoint.read_tensor(tensor)
        linears = checkpoint.tensors[tensor]
        if linears:
            parts = [part for linear in linears for part in linear.parts if part in checkpoint.files.infos]
            summary.add_linears(len(linears), dense.nbytes, sum(checkpoint.files.infos[part].nbytes for part in parts))
        else:
            summary.add_dense(dense)
        yield tensor, dense
