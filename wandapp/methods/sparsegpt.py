"""SparseGPT (arXiv:2301.00774): prune column by column and let the remaining columns make up for the error.

H = (2/N) sum_n X_n^T X_n, damped; U = upper Cholesky factor of H^-1; score_ij = |W_ij| / U_jj.
Removing w_c adds -(w_c / U_cc) * U[c, c+1:] to the rest of the row.
"""

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.kernels.compensate import compensate_block_
from wandapp.kernels.select import select_rows
from wandapp.methods.base import BlockRecord, ScoreTerms, as_one_row, scores_from, scores_of
from wandapp.methods.second_order import SecondOrder
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements

COLUMN_BLOCK = 128


class SparseGPT(SecondOrder[Tensor]):
    """Unstructured masks are chosen per block of 128 columns over all rows, n:m masks from compensated weights."""

    title = "SparseGPT"

    def __init__(self, config: PruneConfig, ranks: Ranks):
        super().__init__(config, ranks)
        self._scales: dict[str, Tensor] = {}  # 1 / U_jj of the block's maps

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        return ScoreTerms(self._scales[view.name])

    def apply(self, block: DecoderBlock, measured: Measurements, pattern: SparsityPattern, record: BlockRecord) -> None:
        self._scales.clear()
        super().apply(block, measured, pattern, record)

    def factorise(self, hessian: Tensor, damping: float) -> Tensor | None:
        return inverse_factor(hessian, damping * hessian.diagonal().mean().item())

    def solve_(self, weights: dict[str, Tensor], factor: Tensor, pattern: SparsityPattern) -> None:
        for name, weight in weights.items():
            self._scales[name] = 1.0 / factor.diagonal()
            with scores_of(name):
                solve_(weight, factor, pattern.at(name))

    def flops(self, out_features: int, in_features: int) -> float:
        return 4 / 3 * in_features**3 + out_features * in_features**2  # 2 per row and pair of columns c < c'


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor U [in, in] of (H + damping * I)^-1 = U^T U, or None where a factorisation fails."""
    damped = hessian.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper


def solve_(weight: Tensor, factor: Tensor, pattern: SparsityPattern) -> None:
    """Prunes and compensates weight [out, in] fp32 in place, 128 columns at a time."""
    columns = weight.shape[1]
    m = pattern.m or 1
    width = COLUMN_BLOCK // m * m or m  # whole groups
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        block, block_factor = weight[:, part], factor[part, part].contiguous()
        with scores_from(column=start):
            if pattern.is_structured:
                error = compensate_block_(block, block_factor, n=pattern.n, m=pattern.m).error
            else:
                mask = _block_mask(block, block_factor, block.numel() - block_zeros(weight.shape, part, pattern))
                error = compensate_block_(block, block_factor, mask=mask).error
        weight[:, part.stop :].addmm_(error, factor[part, part.stop :], alpha=-1.0)


def block_zeros(shape: tuple[int, ...], part: slice, pattern: SparsityPattern) -> int:
    """Weights to remove from the columns `part` of a map: their part of its int(size * sparsity) or counted zeros."""
    rows, columns = shape
    zeros = int(rows * columns * pattern.sparsity) if pattern.exact_zeros is None else pattern.exact_zeros
    return zeros * part.stop // columns - zeros * part.start // columns


def _block_mask(block: Tensor, factor: Tensor, keep: int) -> Tensor:
    """Mask [out, width] of the block's `keep` largest |w| / U_jj, over all rows."""
    scale = (1.0 / factor.diagonal()).repeat(block.shape[0])
    with as_one_row(block):
        return select_rows(block.reshape(1, -1), scale, keep=keep).view(block.shape)
