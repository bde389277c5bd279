"""Wanda (arXiv:2306.11695): score_ij = |W_ij| * s_j, s_j the norm of input feature j."""

from wandapp.blocks import LinearView
from wandapp.methods.base import Method, ScoreTerms
from wandapp.statistics import Measurements


class Wanda(Method):
    """Weights compete inside one output row."""

    needs = frozenset({"column_norm"})

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        return ScoreTerms(measured.column_norm(view))
