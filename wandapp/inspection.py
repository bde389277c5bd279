"""What is in a checkpoint, dense or packed: zeros, the n:m patterns that hold, and which products a GPU could run sparsely.

The model is never built: a skeleton without memory says what each tensor is, and tensors are read one at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandapp.errors import WandappError
from wandapp.packed import PackedCheckpoint
from wandapp.packing import tensor_layout
from wandapp.skeleton import skeleton
from wandapp.weight_files import TensorFiles, checkpoint_files, is_packed

GROUP_SIZES = (2, 4, 8, 16, 32)
_ROWS = 4096  # of a weight looked at together, to bound the memory of counting

# What each library's 2:4 product asks of a weight [out_features, in_features]
GPU_MULTIPLES = {
    "CUTLASS 16 bit": (32, 64),
    "CUTLASS int8": (16, 128),
    "cuSPARSELt 16 bit": (16, 16),
    "cuSPARSELt 8 bit": (32, 32),
}
# Linear maps with the same input, which inference programs multiply as one
FUSIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class LinearFacts:
    """One linear map, or several fused to one.

    patterns  for each group size m that divides in_features, the tightest n:m that holds, where n < m
    fits      whether the shape suits each library of GPU_MULTIPLES
    """

    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    dtype: str
    zeros: int
    patterns: tuple[str, ...]
    fits: dict[str, bool]

    @property
    def sparsity(self) -> float:
        return self.zeros / max(self.shape[0] * self.shape[1], 1)

    @property
    def holds_2of4(self) -> bool:
        return any(pattern in self.patterns for pattern in ("2:4", "1:4", "0:4"))

    def runs_on(self) -> list[str]:
        """The libraries that would take it: shape and pattern both suit."""
        return [library for library, fit in self.fits.items() if fit and self.holds_2of4]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sparsity": self.sparsity, "holds_2of4": self.holds_2of4, "runs_on": self.runs_on()}


@dataclass
class Inspection:
    """All linear maps of the decoder blocks, those that can be fused, and what else the checkpoint holds."""

    folder: str
    form: str  # dense or packed
    model: str
    file_bytes: int = 0
    linears: list[LinearFacts] = field(default_factory=list)
    fused: list[LinearFacts] = field(default_factory=list)
    other_tensors: int = 0

    def totals(self) -> dict[str, Any]:
        weights = sum(linear.shape[0] * linear.shape[1] for linear in self.linears)
        zeros = sum(linear.zeros for linear in self.linears)
        after_fusion = self.after_fusion()
        common = set.intersection(*(set(linear.patterns) for linear in self.linears)) if self.linears else set()
        return {
            "linears": len(self.linears),
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / max(weights, 1),
            "patterns": sorted(common, key=_group_size),
            "gpu": {name: sum(name in linear.runs_on() for linear in self.linears) for name in GPU_MULTIPLES},
            "products_after_fusion": len(after_fusion),
            "gpu_after_fusion": {
                name: sum(name in linear.runs_on() for linear in after_fusion) for name in GPU_MULTIPLES
            },
        }

    def after_fusion(self) -> list[LinearFacts]:
        """The products of a program that fuses: the fused ones, and the linear maps in none of them."""
        inside = {part for linear in self.fused for part in _parts(linear.name)}
        return self.fused + [linear for linear in self.linears if linear.name not in inside]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        lists = {key: [linear.to_dict() for linear in getattr(self, key)] for key in ("linears", "fused")}
        return asdict(self) | lists | {"totals": self.totals()}


def inspect_checkpoint(
    folder: str | Path, *, skip: tuple[str, ...] = (), on_progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Facts about the checkpoint in `folder`.

    skip         regular expressions of linear maps that are left out
    on_progress  called with (tensors read, tensors)
    raises       WandappError on anything missing, damaged or no causal language model
    """
    folder = Path(folder)
    names, read, form, paths = _reader(folder)
    model = skeleton(folder, max_blocks=len(names))
    layout = tensor_layout(model, names, skip, folder)
    found = Inspection(str(folder), form, type(model).__name__, sum(path.stat().st_size for path in paths))
    found.other_tensors = len(names) - len(layout.views)
    for done, (tensor, views) in enumerate(layout.views.items(), start=1):
        stored = read(tensor)
        for view in views:
            if view.parameter.shape != stored.shape:
                raise WandappError(
                    f"{folder}: {tensor} has shape {list(stored.shape)}, config.json asks for {list(view.parameter.shape)}"
                )
            is_alone = layout.homes[tensor].expert is not None  # an expert that the model merges with others
            found.linears.append(_facts(tensor.removesuffix(".weight") if is_alone else view.name, view.of(stored)))
        if on_progress:
            on_progress(done, len(layout.views))
    found.fused = list(_fused(found.linears))
    return found


def _reader(folder: Path) -> tuple[list[str], Callable[[str], Tensor], str, list[Path]]:
    """(tensor names, function that reads one as the dense checkpoint has it, form, files)."""
    if is_packed(folder):
        packed = PackedCheckpoint(folder)
        return list(packed.tensors), packed.read_tensor, "packed", sorted({i.path for i in packed.files.infos.values()})
    if not folder.is_dir():
        raise WandappError(
            f"{folder}: inspect reads a local folder with a checkpoint, and this is none; check the path"
        )
    paths = checkpoint_files(folder)
    files = TensorFiles(paths)
    return list(files.infos), files.read, "dense", paths


def _facts(name: str, weight: Tensor) -> LinearFacts:
    present = weight != 0
    patterns = tuple(_tightest_patterns(present))
    shape = (weight.shape[0], weight.shape[1])
    zeros = weight.numel() - int(torch.count_nonzero(present))
    return LinearFacts(name, shape, str(weight.dtype).removeprefix("torch."), zeros, patterns, _fits(shape))


def _tightest_patterns(present: Tensor) -> Iterator[str]:
    """For each group size that divides the columns of a boolean [out, in], the most True in a group: "2:4"; n = m left out."""
    for m in GROUP_SIZES:
        if present.numel() and present.shape[1] % m == 0:
            n = max(int(rows.unflatten(1, (-1, m)).sum(2).max()) for rows in present.split(_ROWS))
            if n < m:
                yield f"{n}:{m}"


def _fits(shape: tuple[int, int]) -> dict[str, bool]:
    return {name: shape[0] % rows == 0 and shape[1] % cols == 0 for name, (rows, cols) in GPU_MULTIPLES.items()}


def _fused(linears: Iterable[LinearFacts]) -> Iterator[LinearFacts]:
    """One for each set of siblings that FUSIONS names: rows side by side, patterns that hold in all of them."""
    by_name = {linear.name: linear for linear in linears}
    for name in by_name:
        parent, _, leaf = name.rpartition(".")
        for leaves in FUSIONS:
            names = [f"{parent}.{other}" for other in leaves]
            if leaf != leaves[0] or not by_name.keys() >= set(names):
                continue
            parts = [by_name[name] for name in names]
            if len({part.shape[1] for part in parts}) != 1:
                continue
            shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
            common = [pattern for pattern in parts[0].patterns if all(pattern in part.patterns for part in parts)]
            zeros = sum(part.zeros for part in parts)
            yield LinearFacts(f"{parent}.{'+'.join(leaves)}", shape, parts[0].dtype, zeros, tuple(common), _fits(shape))


def _parts(fused_name: str) -> list[str]:
    parent, _, leaves = fused_name.rpartition(".")
    return [f"{parent}.{leaf}" for leaf in leaves.split("+")]


def _group_size(pattern: str) -> int:
    return int(pattern.partition(":")[2])


def not_implied(patterns: Iterable[str]) -> list[str]:
    """Those that do not follow from one of a smaller group: of 2:4 4:8 7:16 stay 2:4 and 7:16."""
    kept: list[str] = []
    for pattern in sorted(patterns, key=_group_size):
        n, m = map(int, pattern.split(":"))
        if all(n / m < _fraction(other) for other in kept):
            kept.append(pattern)
    return kept


def _fraction(pattern: str) -> float:
    n, _, m = pattern.partition(":")
    return int(n) / int(m)
