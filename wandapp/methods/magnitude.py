"""Magnitude: score_ij = |W_ij|. The baseline; it reads no activation."""

from torch import Tensor

from wandapp.blocks import LinearView
from wandapp.kernels.select import prune_rows_
from wandapp.methods.base import Method, ScoreTerms, as_one_row
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements


class Magnitude(Method):
    """Unstructured patterns compare over the whole matrix (the original) or each row (config.magnitude_group)."""

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        return ScoreTerms()

    def select_(self, weight: Tensor, terms: ScoreTerms, pattern: SparsityPattern) -> None:
        if pattern.is_structured or self.config.magnitude_group == "row":
            super().select_(weight, terms, pattern)
        else:
            size = weight.numel()
            with as_one_row(weight):
                prune_rows_(weight.view(1, -1), keep=size - pattern.zeros(1, size))
