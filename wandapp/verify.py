"""Does a checkpoint hold its pattern? Counts and checks every prunable linear map."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wandapp.blocks import LinearView
from wandapp.packed import PackedCheckpoint
from wandapp.packing import tensor_layout
from wandapp.pattern import SparsityPattern
from wandapp.skeleton import skeleton
from wandapp.store import ModelStore

ROUNDING = 0.0011  # cumulative Wanda meets its sparsity within 0.001


@dataclass(frozen=True)
class VerifyReport:
    """ok: the pattern holds everywhere. first_offence: name, row and column of the first weight that breaks it."""

    ok: bool
    pattern: str
    linears: int
    zeros: int
    weights: int
    negative_zeros: int
    first_offence: str | None

    @property
    def sparsity(self) -> float:
        return self.zeros / max(self.weights, 1)


def verify_model(
    model: nn.Module, pattern: SparsityPattern | str, skip: tuple[str, ...] = (), *, together: bool = False
) -> VerifyReport:
    """Checks every linear map in the decoder blocks, along its true input dimension.

    n:m            at most n non-zeros in every m consecutive inputs
    unstructured   at least the stated fraction of zeros in every linear map (rows may differ: methods compare over rows or
                   over the matrix)
    together       the fraction is promised of all linear maps together, as `--allocate` does (`PruneConfig.is_allocated`)
    """
    pattern = SparsityPattern.parse(pattern)
    store = ModelStore(model, pattern, skip=tuple(skip), device=torch.device("cpu"))
    return _verify(((view, view.weight) for linears in store.linears for view in linears.values()), pattern, together)


def verify_packed(
    folder: str | Path, pattern: SparsityPattern | str, skip: tuple[str, ...] = (), *, together: bool = False
) -> VerifyReport:
    """`verify_model` for a packed checkpoint, one tensor at a time; linear maps that it holds dense are checked too."""
    pattern = SparsityPattern.parse(pattern)
    checkpoint = PackedCheckpoint(folder)
    model = skeleton(folder, max_blocks=len(checkpoint.tensors))
    layout = tensor_layout(model, checkpoint.tensors, tuple(skip), folder)
    pieces: dict[str, list[tuple[str, LinearView]]] = {}  # of each linear map, from above to below
    for tensor in sorted(layout.views, key=lambda name: layout.homes[name].part):
        for view in layout.views[tensor]:
            pieces.setdefault(view.name, []).append((tensor, view))

    def weights() -> Iterator[tuple[LinearView, Tensor]]:
        for its_pieces in pieces.values():
            rows = [checkpoint.read_view(tensor, view) for tensor, view in its_pieces]
            yield its_pieces[0][1], rows[0] if len(rows) == 1 else torch.cat(rows)

    return _verify(weights(), pattern, together)


def _verify(weights: Iterable[tuple[LinearView, Tensor]], pattern: SparsityPattern, together: bool) -> VerifyReport:
    linears = zeros = count = negative = 0
    first = None
    for view, weight in weights:
        linears += 1
        zeros += int((weight == 0).sum())
        negative += int(((weight == 0) & torch.signbit(weight)).sum())
        count += weight.numel()
        first = first or not_finite(view, weight) or (None if together else offence(view, weight, pattern))
    if together and zeros < int(pattern.sparsity * count):
        first = (
            f"all {linears} linear maps together: {zeros} zeros, {pattern} of {count} weights asks for "
            f"{int(pattern.sparsity * count)}"
        )
    return VerifyReport(first is None, str(pattern), linears, zeros, count, negative, first)


def not_finite(view: LinearView, weight: Tensor) -> str | None:
    """One sentence on the first NaN or Inf in weight [out, in], or None."""
    if not weight.numel() or all(extreme.isfinite() for extreme in torch.aminmax(weight)):
        return None
    row, column = weight.isfinite().logical_not().nonzero()[0].tolist()
    return f"{view.name}: row {row}, column {column} is NaN or Inf"


def offence(view: LinearView, weight: Tensor, pattern: SparsityPattern) -> str | None:
    """One sentence on the first place where weight [out, in] breaks the pattern, or None."""
    pattern = pattern.at(view.name)
    if pattern.is_structured:
        position = pattern.first_violation(weight)
        if position is None:
            return None
        row, column = position
        count = int((weight[row, column : column + pattern.m] != 0).sum())
        return (
            f"{view.name}: row {row}, columns {column}..{column + pattern.m - 1} hold {count} non-zeros, "
            f"{pattern} allows {pattern.n}"
        )
    rows, columns = weight.shape
    promised = pattern.zeros(rows, columns) / max(weight.numel(), 1) - ROUNDING
    present = weight != 0
    found = 1 - int(present.sum()) / max(weight.numel(), 1)
    if found >= promised:
        return None
    row = int(present.sum(dim=1).argmax())
    column = int(present[row].int().argmax())
    return (
        f"{view.name}: {found:.4%} zeros, {pattern} asks for {pattern.sparsity:.4%}; the densest is row {row}, whose first "
        f"non-zero is column {column}"
    )
