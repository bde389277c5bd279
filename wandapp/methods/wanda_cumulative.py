"""Wanda's cumulative variant (arXiv:2306.11695, authors' `use_variant`): rows of unequal density, one matrix sparsity."""

import torch
from torch import Tensor

from wandapp.methods.base import ScoreTerms
from wandapp.methods.wanda import Wanda
from wandapp.pattern import SparsityPattern

TOLERANCE = 0.001


class WandaCumulative(Wanda):
    """Each row loses its longest ascending prefix of scores whose sum stays below beta * (the row's total).

    beta is bisected from 0.4 in [0, 0.8] until the matrix's sparsity is within 0.001 of the target, or until no threshold
    lies between two neighbours any more. n:m patterns leave no such freedom and equal Wanda.
    """

    is_exact = False

    def select_(self, weight: Tensor, terms: ScoreTerms, pattern: SparsityPattern) -> None:
        if pattern.is_structured:
            return super().select_(weight, terms, pattern)
        score, order = torch.sort(weight.float().abs() * terms.column_scale, dim=1, stable=True)  # [out, in]
        cumulative = score.cumsum(dim=1)
        low, high, beta = 0.0, 0.8, 0.4
        while True:
            removed = (cumulative <= cumulative[:, -1:] * beta).sum(dim=1)  # [out]
            sparsity = removed.sum().item() / weight.numel()
            if abs(sparsity - pattern.sparsity) <= TOLERANCE or high - low < 1e-6:
                break
            low, high = (beta, high) if sparsity < pattern.sparsity else (low, beta)
            beta = (low + high) / 2
        position = torch.arange(weight.shape[1], device=weight.device)
        drop = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, position < removed[:, None])
        weight.masked_fill_(drop, 0.0)
