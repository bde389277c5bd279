"""Wanda's cumulative variant (arXiv:2306.11695, authors' `use_variant`): rows of unequal density, one matrix sparsity."""

import torch
from torch import Tensor

from wandapp.errors import NonFiniteScoreError, UnreachableSparsityError
from wandapp.methods.base import ScoreTerms
from wandapp.methods.wanda import Wanda
from wandapp.pattern import SparsityPattern

TOLERANCE, HIGHEST = 0.001, 0.8


class WandaCumulative(Wanda):
    """Each row loses its longest ascending prefix of scores whose sum stays below beta * (the row's total).

    beta is bisected from 0.4 in [0, 0.8] until the matrix's sparsity is within 0.001 of the target, or until no threshold
    lies between two neighbours any more; then the higher one is taken. n:m patterns leave no such freedom and equal Wanda.
    """

    is_exact = False

    def select_(self, weight: Tensor, terms: ScoreTerms, pattern: SparsityPattern) -> None:
        if pattern.is_structured:
            return super().select_(weight, terms, pattern)
        score = weight.float().abs()
        if terms.column_scale is not None:
            score *= terms.column_scale
        if not score.isfinite().all():
            raise NonFiniteScoreError(*score.isfinite().logical_not().nonzero()[0].tolist())
        score, order = torch.sort(score, dim=1, stable=True)  # [out, in]
        removed = rows_removed(score.cumsum(dim=1), pattern.sparsity)
        position = torch.arange(weight.shape[1], device=weight.device)
        drop = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, position < removed[:, None])
        weight.masked_fill_(drop, 0.0)


def rows_removed(cumulative: Tensor, sparsity: float) -> Tensor:
    """How many of its lowest scores each row loses, [out], by the ascending sums cumulative [out, in]."""

    def below(beta: float) -> tuple[Tensor, float]:
        removed = (cumulative <= cumulative[:, -1:] * beta).sum(dim=1)
        return removed, removed.sum().item() / cumulative.numel() - sparsity

    low, high, beta = 0.0, HIGHEST, HIGHEST / 2
    removed, excess = below(beta)
    while abs(excess) > TOLERANCE and high - low >= 1e-6:
        low, high = (beta, high) if excess < 0 else (low, beta)
        beta = (low + high) / 2
        removed, excess = below(beta)
    if excess < -TOLERANCE:
        removed, excess = below(high)
    if excess < -TOLERANCE:
        raise UnreachableSparsityError(
            f"wanda-cumulative removes no more than the lowest scores that make up {HIGHEST} of a row's sum, "
            f"{sparsity + excess:.1%} of this map's weights, and {sparsity:.1%} are asked for; use --method wanda"
        )
    return removed
