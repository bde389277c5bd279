"""Packs a pruned checkpoint and restores it, block by block: neither way holds the dense model in memory."""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from wandapp.blocks import LinearView, find_blocks, find_linears
from wandapp.card import PACKED_NOTE
from wandapp.config import RECIPE_FILE, PruneConfig
from wandapp.conversion import Home, tensor_homes
from wandapp.errors import WandappError, nearest
from wandapp.kernels.pack import Packed, pack
from wandapp.kernels.pack.int8 import relative_error, to_int8
from wandapp.memory import give_back
from wandapp.output import LOCK, MANIFEST, output_folder
from wandapp.packed import FORMAT, VERSIONS, Manifest, PackedCheckpoint, PackedLinear
from wandapp.pattern import SparsityPattern
from wandapp.shards import write_index
from wandapp.skeleton import skeleton
from wandapp.weight_files import PACKED_MANIFEST, TensorInfo, checkpoint_tensors, read_json

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
# Of the folder they lie in alone. A copied run manifest would make what a killed unpack left look like a run to resume.
_OWN_FILES = {PACKED_MANIFEST, MANIFEST, LOCK}


@dataclass
class PackSummary:
    """What packing or unpacking did. Bytes are those of all tensors; linear_* count the packed linear maps alone.

    mean_error, worst_error   of packing to int8: ||W - W'|| / ||W||, mean over the linear maps and the largest, which is
                              that of worst_linear; None where the packed form holds the weights exactly
    """

    pattern: str
    storage: str = "same"
    linears: int = 0
    kept_dense: int = 0
    negative_zeros: int = 0
    dense_bytes: int = 0
    packed_bytes: int = 0
    linear_dense_bytes: int = 0
    linear_packed_bytes: int = 0
    mean_error: float | None = None
    worst_error: float | None = None
    worst_linear: str | None = None

    def add_linears(self, count: int, dense_bytes: int, packed_bytes: int) -> None:
        self.linears += count
        self.dense_bytes += dense_bytes
        self.linear_dense_bytes += dense_bytes
        self.packed_bytes += packed_bytes
        self.linear_packed_bytes += packed_bytes

    def add_error(self, name: str, error: float) -> None:
        """Of a linear map that `add_linears` has counted already."""
        self.mean_error = ((self.mean_error or 0.0) * (self.linears - 1) + error) / self.linears
        if self.worst_error is None or error > self.worst_error:
            self.worst_error, self.worst_linear = error, name

    def add_dense(self, tensor: Tensor) -> None:
        self.kept_dense += 1
        self.dense_bytes += tensor.nbytes
        self.packed_bytes += tensor.nbytes


Progress = Callable[[int, int], None]


class TensorSource(Protocol):
    """A dense checkpoint's tensors by name, read one at a time: `TensorFiles`, or those of a model in memory."""

    infos: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor: ...


def pack_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    sparsity: str | SparsityPattern | None = None,
    skip: tuple[str, ...] | None = None,
    storage: str = "same",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> PackSummary:
    """Packs the pruned checkpoint in folder `source` into the new folder `out`; returns the sizes.

    sparsity, skip   what was pruned; None: what the folder's wandapp/recipe.yaml says
    storage          "same": kept weights as they are; "int8": rounded to 127 steps of their row's largest, lossy
    on_progress      called with (files written, files in all)
    raises           WandappError, and TooManyNonZerosError where a linear map does not hold the pattern
    """
    source = Path(source)
    if storage not in VERSIONS:
        raise WandappError(f"unknown storage {storage!r}; {nearest(storage, VERSIONS)}")
    files = checkpoint_tensors(source)
    pattern, skip = _what_was_pruned(source, sparsity, skip)
    model = skeleton(source, max_blocks=len(files.infos))
    with output_folder(out, overwrite, source) as partial:
        copy_companions(source, partial)
        add_recipe(partial, pattern, skip)
        return write_packed(partial, model, files, pattern, skip, source, storage, on_progress)


def write_packed(
    folder: Path,
    model: torch.nn.Module,
    tensors: TensorSource,
    pattern: SparsityPattern,
    skip: tuple[str, ...],
    place: str | Path,
    storage: str = "same",
    on_progress: Progress | None = None,
) -> PackSummary:
    """Writes the packed form of a dense checkpoint's `tensors`, a file per block; returns the sizes.

    model   what they belong to; may be a skeleton
    place   what errors say the tensors belong to
    """
    plan = _Plan.of(model, tensors, pattern, skip, place)
    summary = PackSummary(str(pattern), storage)
    packed = [_packed_group(group, plan, tensors, pattern, summary) for group in plan.groups]
    written = write_shards(folder, "packed", packed, on_progress)
    manifest = Manifest(
        format=FORMAT,
        version=VERSIONS[storage],
        pattern=str(pattern),
        files=[path.name for path in written],
        linears=plan.entries,
        dense=plan.dense,
    )
    (folder / PACKED_MANIFEST).parent.mkdir(exist_ok=True)
    (folder / PACKED_MANIFEST).write_text(
        manifest.model_dump_json(indent=1, exclude_defaults=True) + "\n", encoding="utf-8"
    )
    return summary


Shard = Iterable[tuple[str, Tensor]]


def write_shards(folder: Path, stem: str, shards: Sequence[Shard], on_progress: Progress | None = None) -> list[Path]:
    """One safetensors file per shard, each made when it is written; the files."""
    written = []
    for done, shard in enumerate(shards, start=1):
        written.append(folder / f"{stem}-{done:05}-of-{len(shards):05}.safetensors")
        _save(shard, written[-1])
        if on_progress:
            on_progress(done, len(shards))
    return written


class Layout(NamedTuple):
    """How a model sees the tensors of its dense checkpoint.

    homes   where it keeps each of them
    views   linear maps of the decoder blocks by tensor; a tensor that is part of an expert's rows has a view of its own,
            under the expert's name
    """

    homes: dict[str, Home]
    views: dict[str, list[LinearView]]


def tensor_layout(model: torch.nn.Module, names: Iterable[str], skip: tuple[str, ...], place: str | Path) -> Layout:
    """The layout of the checkpoint tensors `names` in `model`, which may be a skeleton; views without skipped ones.

    place   what errors say the tensors belong to
    raises  WandappError on a linear map of the blocks that no tensor holds
    """
    places = tensor_homes(model, names)
    tensors_of: dict[tuple[str, int | None], list[str]] = {}
    for tensor, home in places.items():
        tensors_of.setdefault((home.name, home.expert), []).append(tensor)
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    views: dict[str, list[LinearView]] = {}
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name, view in find_linears(block, f"{prefix}.{index}", skip).items():
            parameter = parameters[id(view.parameter)]
            tensors = tensors_of.get((parameter, None)) or tensors_of.get((parameter, view.index))
            if tensors is None:
                raise WandappError(f"{place}: the checkpoint has no tensor for {name}; prune and save it again")
            if not any(re.search(expression, name) for expression in skip):
                for tensor in tensors:
                    views.setdefault(tensor, []).append(_piece(view, places[tensor]))
    return Layout(places, views)


def _piece(view: LinearView, home: Home) -> LinearView:
    if home.expert is None:
        return view
    rows, cols = view.weight.shape
    rows_of_part = torch.empty(rows // home.parts, cols, device="meta", dtype=view.weight.dtype)
    return LinearView(view.name, torch.nn.Parameter(rows_of_part, requires_grad=False))


@dataclass
class _Plan:
    """Which tensors become packed linear maps (views by tensor), which stay dense, and what lies in which file."""

    views: dict[str, list[LinearView]]
    groups: list[list[str]]
    entries: list[PackedLinear] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        files: TensorSource,
        pattern: SparsityPattern,
        skip: tuple[str, ...],
        place: str | Path,
    ) -> "_Plan":
        layout = tensor_layout(model, files.infos, skip, place)
        for tensor, its_views in layout.views.items():
            found, expected = files.infos[tensor].shape, tuple(its_views[0].parameter.shape)
            if found != expected:
                raise WandappError(f"{place}: {tensor} has shape {list(found)}, config.json asks for {list(expected)}")
            pattern.require_fit(its_views[0].name, its_views[0].weight.shape[1])
        return cls(layout.views, block_groups(model, layout.homes, files))


def block_groups(model: torch.nn.Module, homes: dict[str, Home], files: TensorSource) -> list[list[str]]:
    """The tensors of everything outside the blocks, then those of each block; tied weights once."""
    groups: dict[int, list[str]] = {}
    prefix = re.escape(find_blocks(model)[0])
    for tensor in _without_ties(model, homes, files):
        block = re.match(rf"{prefix}\.(\d+)\.", homes[tensor].name)
        groups.setdefault(int(block[1]) if block else -1, []).append(tensor)
    return [groups[index] for index in sorted(groups)]


def _without_ties(model: torch.nn.Module, homes: dict[str, Home], files: TensorSource) -> Iterator[str]:
    """The tensors without the second name of a tied weight, where the checkpoint stores an equal copy under it."""
    tied = getattr(model, "all_tied_weights_keys", {})  # second name inside the model -> first
    tensor_of = {home.name: tensor for tensor, home in homes.items()}
    for tensor, home in homes.items():
        first = tensor_of.get(tied.get(home.name))
        if first is None or not torch.equal(files.read(tensor), files.read(first)):
            yield tensor


def _packed_group(
    tensors: list[str], plan: _Plan, files: TensorSource, pattern: SparsityPattern, summary: PackSummary
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
            packed = exact = _pack_view(view.name, weight, pattern)
            if summary.storage == "int8":
                packed = _in_int8(view.name, exact)
            summary.add_linears(1, weight.nbytes, packed.nbytes)
            if packed is not exact:
                summary.add_error(view.name, relative_error(exact, packed))
            summary.negative_zeros += _count_negative_zeros(weight)
            name = tensor.removesuffix(".weight") if view.index is None else f"{tensor}.{view.index}"
            entry = PackedLinear(
                name=name,
                tensor=tensor,
                shape=packed.shape,
                dtype=str(weight.dtype).removeprefix("torch."),
                transposed=view.transposed,
                index=view.index,
                storage=summary.storage,
            )
            plan.entries.append(entry)
            yield from ((name, part) for name, part in zip(entry.parts, packed.parts, strict=True) if part is not None)


def _pack_view(name: str, weight: Tensor, pattern: SparsityPattern) -> Packed:
    try:
        return pack(weight, n=pattern.n, m=pattern.m)
    except WandappError as error:
        raise WandappError(f"{name}: {error}") from error


def _in_int8(name: str, packed: Packed) -> Packed:
    try:
        return to_int8(packed)
    except WandappError as error:
        raise WandappError(f"{name}: {error}") from error


def _count_negative_zeros(weight: Tensor) -> int:
    bits = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
    return int(torch.count_nonzero(bits == torch.iinfo(bits.dtype).min))  # the sign bit alone


def _save(tensors: Shard, path: Path) -> None:
    """One file. Tensors are dropped at the end of this function, and glibc would keep their memory for later."""
    held = dict(tensors)
    save_file(held, path, metadata={"format": "pt"})
    held.clear()
    give_back()


def _what_was_pruned(
    source: Path, sparsity: str | None, skip: Sequence[str] | None
) -> tuple[SparsityPattern, tuple[str, ...]]:
    wanted = sparsity is None or (source / RECIPE_FILE).is_file()
    recipe = PruneConfig.of_checkpoint(source) if wanted else None
    pattern = SparsityPattern.parse(recipe.sparsity if sparsity is None else sparsity)
    return pattern, tuple((recipe.skip if recipe else ()) if skip is None else skip)


def add_recipe(folder: Path, pattern: SparsityPattern, skip: tuple[str, ...]) -> None:
    """Where the checkpoint came without a recipe: what was pruned, so that verify and unpack know."""
    recipe = folder / "wandapp" / "recipe.yaml"
    if not recipe.is_file():
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(json.dumps({"sparsity": str(pattern), "skip": list(skip)}) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copies config, tokenizer, recipe and whatever else is no weight file."""
    for path in sorted([*source.iterdir(), *(source / "wandapp").glob("*")]):
        place = path.relative_to(source)
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and str(place) not in _OWN_FILES:
            (target / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / place)
    card = target / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        packed = (source / PACKED_MANIFEST).is_file()
        card.write_text(text.removesuffix(PACKED_NOTE) if packed else text + PACKED_NOTE, encoding="utf-8")


def unpack_checkpoint(
    packed: str | Path, out: str | Path, *, overwrite: bool = False, on_progress: Progress | None = None
) -> PackSummary:
    """Writes the dense checkpoint that was packed into the new folder `out`; returns the sizes.

    Bit for bit, but from int8 storage: that gives the rounded weights scale * value, which no longer tell the old ones.
    """
    checkpoint = PackedCheckpoint(packed)
    read_json(
        checkpoint.folder / "config.json", "the model's configuration"
    )  # without it the result would be no checkpoint
    summary = PackSummary(str(checkpoint.pattern), checkpoint.storage)
    groups: dict[Path, list[str]] = {}
    for tensor in checkpoint.tensors:
        groups.setdefault(checkpoint.path_of_tensor(tensor), []).append(tensor)
    with output_folder(out, overwrite, packed) as partial:
        copy_companions(checkpoint.folder, partial)
        shards = [_unpacked_group(groups[path], checkpoint, summary) for path in sorted(groups)]
        write_index(partial, write_shards(partial, "model", shards, on_progress))
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
