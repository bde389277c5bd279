"""Regional gradient score of Wanda++ (arXiv:2503.04992): score_ij = |W_ij| * (alpha * G_ij + s_j).

G_ij = sqrt((1/N) sum_n (d ||f(X_n)||_F / dW_ij)^2), f the dense block; s_j Wanda's input norm; alpha = 100.
"""

from wandapp.blocks import LinearView
from wandapp.methods.base import Method, ScoreTerms
from wandapp.statistics import Measurements


class RegionalGradientScore(Method):
    """One forward and one backward of the dense block per sample, no labels."""

    needs = frozenset({"column_norm", "regional_gradient"})

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        norm, gradient = measured.column_norm(view), measured.gradients[view.name].value()
        alpha = self.config.alpha
        assert alpha is not None  # the preset's, if nobody gave one
        if self.config.alpha_unit == "relative":
            alpha *= (norm.mean() / gradient.mean().clamp_min(1e-30)).item()
        return ScoreTerms(norm, gradient, alpha)
