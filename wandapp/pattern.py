"""Which weights a row may keep: a fraction of zeros ("0.5") or n of every m consecutive inputs ("2:4").

n:m names what is *kept*: 2:4 keeps two of four, 1:4 keeps one. All groups run along in_features.

    row of a [out, in] weight, 2:4     | a . b . | . . c d | e . . f |      . = zero
    row of a [out, in] weight, 0.5     | a b . . . . c d . e . f |          int(in * 0.5) zeros, anywhere
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from wandapp.errors import WandappError

if TYPE_CHECKING:
    from torch import Tensor

_FORMS = "give n:m such as 2:4 (keep 2 of every 4), or a fraction of zeros such as 0.5"
_CHECKED_AT_ONCE = 1 << 22  # weights; bounds the temporaries of a check to tens of megabytes


@dataclass(frozen=True)
class SparsityPattern:
    """The weights one row may keep. Make one with `SparsityPattern.parse`."""

    sparsity: float  # fraction of zeros
    n: int | None = None  # kept of every m; None: unstructured
    m: int | None = None
    exact_zeros: int | None = None  # in a whole [out, in] weight, where they were counted out (wandapp.allocation)

    @classmethod
    def parse(cls, text: str | float | SparsityPattern) -> SparsityPattern:
        """The pattern that "2:4", "0.5", "50%" or 0.5 stands for."""
        if isinstance(text, SparsityPattern):
            return text
        compact = re.sub(r"\s", "", str(text))
        if nm := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", compact):
            return cls._structured(int(nm[1]), int(nm[2]))
        try:
            fraction = float(compact[:-1]) / 100 if compact.endswith("%") else float(compact)
        except ValueError:
            raise WandappError(f"sparsity {text!r} is neither n:m nor a number; {_FORMS}") from None
        if not 0 < fraction < 1:
            raise WandappError(f"sparsity must lie above 0 and below 1, got {text}; {_FORMS}")
        return cls(fraction)

    @classmethod
    def _structured(cls, n: int, m: int) -> SparsityPattern:
        if not 0 < n < m:
            raise WandappError(f"sparsity n:m keeps n of every m weights and needs 0 < n < m, got {n}:{m}; {_FORMS}")
        return cls(1 - n / m, n, m)

    @property
    def is_structured(self) -> bool:
        return self.m is not None

    @property
    def n_and_m(self) -> tuple[int, int]:
        """Of a structured pattern."""
        assert self.n is not None and self.m is not None
        return self.n, self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.is_structured else f"{self.sparsity!r}"

    def keep(self, in_features: int) -> int:
        """Number of weights each row keeps: exact for n:m, in_features - int(in_features * sparsity) otherwise."""
        if self.is_structured:
            return in_features // self.m * self.n
        return in_features - int(in_features * self.sparsity)

    def zeros(self, out_features: int, in_features: int) -> int:
        """Number of weights to remove from a whole [out, in] weight: as counted out, or as many as its rows lose together."""
        if self.exact_zeros is not None:
            return self.exact_zeros
        return out_features * (in_features - self.keep(in_features))

    def at(self, name: str) -> SparsityPattern:
        """The pattern of one linear map, by its dotted name."""
        return self

    def require_fit(self, name: str, in_features: int) -> None:
        """Raise unless a linear map of that many inputs can hold the pattern; `name` is its dotted name."""
        if self.is_structured and in_features % self.m:
            raise WandappError(
                f"{name}: {self} needs in_features divisible by {self.m}, got {in_features}; "
                f"exclude it with --skip {name.rpartition('.')[2]}"
            )

    def first_violation(self, weight: Tensor, group: Literal["row", "matrix"] = "row") -> tuple[int, int] | None:
        """(row, column) of the first excess of non-zeros in a [out, in] weight, or None where the pattern holds.

        n:m           the column is the first of the group that holds more than n non-zeros.
        unstructured  the column is the first non-zero that is one too many; group="matrix" counts the zeros of the
                      whole weight instead of each row's (a threshold per matrix leaves rows of unequal density).
        """
        out_features, in_features = weight.shape
        if weight.numel() == 0:
            return None
        if self.is_structured:
            self.require_fit("weight", in_features)
        if group == "matrix" and not self.is_structured:
            return self._first_beyond((weight != 0).reshape(1, -1), in_features)
        step = max(_CHECKED_AT_ONCE // in_features, 1)
        for start in range(0, out_features, step):
            present = weight[start : start + step] != 0
            position = self._first_crowded(present) if self.is_structured else self._first_beyond(present, in_features)
            if position:
                return start + position[0], position[1]
        return None

    def _first_crowded(self, present: Tensor) -> tuple[int, int] | None:
        """(row, first column) of the first group that holds more than n; counts by strided sums, six times sum(2)'s speed."""
        n, m = self.n_and_m
        counts = present[:, ::m].short()  # [rows, in / m]
        for column in range(1, m):
            counts += present[:, column::m]
        position = _first_true(counts > n)
        return position and (position[0], position[1] * m)

    def _first_beyond(self, present: Tensor, in_features: int) -> tuple[int, int] | None:
        """(row, column) of the first non-zero that is one too many in its row of `present`; columns wrap at in_features."""
        keep = self.keep(present.shape[1])
        crowded = (present.count_nonzero(1) > keep).nonzero()
        if not len(crowded):
            return None
        row = int(crowded[0])
        column = int((present[row].cumsum(0) > keep).int().argmax())
        return row + column // in_features, column % in_features

    def holds(self, weight: Tensor, group: Literal["row", "matrix"] = "row") -> bool:
        """Whether a [out, in] weight has the pattern; more zeros than asked for are fine."""
        return self.first_violation(weight, group) is None


@dataclass(frozen=True)
class AllocatedPattern(SparsityPattern):
    """An unstructured pattern whose zeros are counted out by linear map; their sum is exact."""

    zeros_by_map: Mapping[str, int] = field(default_factory=dict, hash=False)
    weights_by_map: Mapping[str, int] = field(default_factory=dict, hash=False)

    def at(self, name: str) -> SparsityPattern:
        zeros = self.zeros_by_map[name]
        return SparsityPattern(zeros / self.weights_by_map[name], exact_zeros=zeros)


def _first_true(mask: Tensor) -> tuple[int, int] | None:
    """(row, column) of the first True of a matrix in reading order."""
    position = int(mask.flatten().int().argmax())  # argmax: the first of equal maxima
    row, column = divmod(position, mask.shape[1])
    return (row, column) if bool(mask[row, column]) else None
