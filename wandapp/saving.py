"""Saves a packed model that is in memory, in either form, and one block at a time."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wandapp.blocks import find_blocks, find_linears
from wandapp.conversion import checkpoint_state, tensor_homes
from wandapp.errors import WandappError
from wandapp.models import save_companions
from wandapp.modules import SparseExperts, SparseLinear
from wandapp.output import output_folder
from wandapp.packing import (
    PackSummary,
    add_recipe,
    block_groups,
    write_packed,
    write_shards,
)
from wandapp.pattern import SparsityPattern
from wandapp.shards import write_index
from wandapp.skeleton import skeleton_of
from wandapp.weight_files import TensorInfo


class Pruned(NamedTuple):
    """What `load_sparse` and `sparsify` remember of a model: its pattern, and the linear maps that were left dense."""

    pattern: SparsityPattern
    kept_dense: frozenset[str]

    def skip(self, skeleton: nn.Module) -> tuple[str, ...]:
        """Regular expressions of the linear maps that were left dense."""
        every = tuple(f"^{re.escape(name)}$" for name in sorted(self.kept_dense))
        prefix, blocks = find_blocks(skeleton)
        names = {name for i, block in enumerate(blocks) for name in find_linears(block, f"{prefix}.{i}", every)}
        return tuple(f"^{re.escape(name)}$" for name in sorted(self.kept_dense & names))


def save_sparse(
    model: nn.Module, out: str | Path, *, packed: bool = True, tokenizer: Any | None = None, overwrite: bool = False
) -> PackSummary:
    """Writes a model of `load_sparse` or `sparsify` into the new folder `out`, complete or not at all; returns the sizes.

    packed   True: the packed form, which load_sparse reads; False: an ordinary checkpoint, dense with zeros. int8 weights
             are packed as int8 again, from what they stand for
    raises   WandappError where the model is no packed one, or `out` exists without `overwrite`
    """
    pruned = getattr(model, "wandapp_pruned", None)
    if pruned is None:
        raise WandappError(f"{type(model).__name__}: no model of load_sparse or sparsify; save it by save_pretrained")
    tensors = _ModelTensors(model)
    skip = pruned.skip(tensors.skeleton)
    with output_folder(out, overwrite) as partial:
        save_companions(model, tokenizer, partial)
        add_recipe(partial, pruned.pattern, skip)
        if packed:
            storage = (
                "int8" if any(isinstance(m, SparseLinear) and m.scale is not None for m in model.modules()) else "same"
            )
            return write_packed(partial, tensors.skeleton, tensors, pruned.pattern, skip, out, storage)
        return _write_dense(partial, tensors, pruned.pattern)


def remember(model: nn.Module, pattern: SparsityPattern, kept_dense: set[str]) -> None:
    """Makes `model` one that save_sparse can save, and whose save_pretrained writes the dense form.

    kept_dense  names of the linear maps that the pattern does not hold for; other names are allowed in it
    """
    model.wandapp_pruned = Pruned(pattern, frozenset(kept_dense))
    model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(model: nn.Module, save_directory: str | Path, **options: Any) -> None:
    """transformers' save_pretrained with all its options; the dense model is held in memory (save_sparse holds a block)."""
    if options.get("state_dict") is None:
        options["state_dict"] = {name: _parameter(model, name) for name in _dense_skeleton(model).state_dict()}
    type(model).save_pretrained(model, save_directory, **options)


def _write_dense(folder: Path, tensors: "_ModelTensors", pattern: SparsityPattern) -> PackSummary:
    summary = PackSummary(str(pattern))

    def shard(group: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in group:
            tensor = tensors.read(name)
            summary.add_dense(tensor)
            yield name, tensor

    groups = block_groups(tensors.skeleton, tensors.homes, tensors)
    write_index(folder, write_shards(folder, "model", [shard(group) for group in groups]))
    return summary


class _ModelTensors:
    """The tensors that a dense checkpoint of `model` holds; one is made when it is read (a `TensorSource`)."""

    def __init__(self, model: nn.Module):
        self.model, self.skeleton = model, _dense_skeleton(model)
        state = checkpoint_state(self.skeleton, dict(self.skeleton.state_dict()))
        self.homes = tensor_homes(self.skeleton, state)
        self.infos = {
            name: TensorInfo(Path(), str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()
        }

    def read(self, name: str) -> Tensor:
        home = self.homes[name]
        tensor = _parameter(self.model, home.name, home.expert)
        rows = tensor if home.parts == 1 else tensor.chunk(home.parts)[home.part]
        return rows.cpu().contiguous()


def _dense_skeleton(model: nn.Module) -> nn.Module:
    """What `model` was before its linear maps were packed, on the meta device."""
    return skeleton_of(model.config, model.dtype)


def _parameter(model: nn.Module, name: str, expert: int | None = None) -> Tensor:
    """A parameter or buffer as the dense model has it, or one expert's rows of it."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, SparseLinear) and last == "weight":
        return _stored(module, model.dtype)
    value = getattr(module, last)
    if isinstance(value, SparseExperts):
        every = [_stored(one, model.dtype) for one in (value if expert is None else [value[expert]])]
        return torch.stack(every) if expert is None else every[0]
    return value.detach() if expert is None else value.detach()[expert]


def _stored(linear: SparseLinear, dtype: torch.dtype) -> Tensor:
    weight = linear.to_dense(dtype)
    return weight.T.contiguous() if linear.transposed else weight
