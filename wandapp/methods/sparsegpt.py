"""SparseGPT (arXiv:2301.00774): prune column by column and let the remaining columns make up for the error.

H = (2/N) sum_n X_n^T X_n, damped; U = upper Cholesky factor of H^-1; score_ij = |W_ij| / U_jj.
Removing w_c adds -(w_c / U_cc) * U[c, c+1:] to the rest of the row.
"""

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.errors import NonFiniteScoreError, WandappError
from wandapp.kernels.compensate import compensate_block_
from wandapp.kernels.select import select_rows
from wandapp.methods.base import BlockRecord, Method, ScoreTerms
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements

COLUMN_BLOCK = 128
DAMPING_STEPS = 3  # tenfold each


class SparseGPT(Method):
    """Unstructured masks are chosen per block of 128 columns over all rows, n:m masks from compensated weights."""

    needs = frozenset({"hessian"})
    compensates = True

    def __init__(self, config, ranks):
        super().__init__(config, ranks)
        self._factors: dict[int, Tensor] = {}

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        return ScoreTerms(1.0 / self._factor(view, measured, None).diagonal())

    def apply(self, block: DecoderBlock, measured: Measurements, pattern: SparsityPattern, record: BlockRecord) -> None:
        self._factors.clear()
        for view in block.linears.values():
            if view.is_expert and not measured.tokens.get(view.name):
                self.prune_linear_(view, view.weight, self.checked_terms(view, measured, record), pattern)
                continue
            block.flops += (
                0.0 if id(measured.hessians[view.name]) in self._factors else 4 / 3 * view.weight.shape[1] ** 3
            )
            factor = self._factor(view, measured, record)
            weight = view.weight.float().contiguous()
            dead = measured.hessians[view.name].value.diagonal() == 0
            weight[:, dead] = 0.0
            try:
                solve_(weight, factor, pattern)
            except NonFiniteScoreError as error:
                raise WandappError(f"{view.name}: {error}") from None
            block.flops += weight.shape[0] * weight.shape[1] ** 2  # 2 per row and pair of columns c < c'
            if not torch.isfinite(weight).all():
                raise WandappError(f"{view.name}: SparseGPT's compensated weights are not finite; raise --damping")
            view.weight.copy_(weight.add_(0.0))  # -0.0 becomes +0.0

    def _factor(self, view: LinearView, measured: Measurements, record: BlockRecord | None) -> Tensor:
        """U of the map's input, computed once for all maps that share the input."""
        hessian = measured.hessians[view.name]
        if id(hessian) not in self._factors:
            self._factors[id(hessian)] = self._factorise(view.name, hessian.value, record)
        return self._factors[id(hessian)]

    def _factorise(self, name: str, hessian: Tensor, record: BlockRecord | None) -> Tensor:
        if not torch.isfinite(hessian).all():
            raise WandappError(f"{name}: the Hessian of its inputs holds NaN or Inf; use a wider --dtype")
        hessian = hessian.clone()
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1.0
        mean = diagonal.mean().item()
        damping = self.config.damping
        for step in range(DAMPING_STEPS + 1):
            factor = inverse_factor(hessian, damping * 10**step * mean)
            if factor is not None:
                if step and record is not None:
                    record.warnings.append(
                        f"{name}: Hessian not positive definite, damping raised to {damping * 10**step:g}"
                    )
                return factor
        raise WandappError(
            f"{name}: the Hessian cannot be factorised even with damping {damping * 10**DAMPING_STEPS:g}; "
            "use more or other calibration text, or a larger --damping"
        )


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
    width = COLUMN_BLOCK if not pattern.is_structured else COLUMN_BLOCK // pattern.m * pattern.m or pattern.m
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        block, block_factor = weight[:, part], factor[part, part].contiguous()
        if pattern.is_structured:
            error = compensate_block_(block, block_factor, n=pattern.n, m=pattern.m).error
        else:
            error = compensate_block_(block, block_factor, mask=_block_mask(block, block_factor, pattern)).error
        weight[:, part.stop :].addmm_(error, factor[part, part.stop :], alpha=-1.0)


def _block_mask(block: Tensor, factor: Tensor, pattern: SparsityPattern) -> Tensor:
    """Mask [out, width] that removes exactly int(size * sparsity) of the block's smallest |w| / U_jj, over all rows."""
    flat = block.reshape(1, -1)
    scale = (1.0 / factor.diagonal()).repeat(block.shape[0])
    return select_rows(flat, scale, keep=pattern.keep(flat.shape[1])).view(block.shape)
