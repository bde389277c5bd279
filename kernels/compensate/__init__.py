"""SparseGPT's column loop over one block of columns: prune a column, spread its error over the columns to its right."""

from typing import NamedTuple

import torch
from torch import Tensor

from wandapp.errors import NonFiniteScoreError
from wandapp.kernels import dispatch
from wandapp.kernels.checks import check_group, check_like, check_matrix, check_writable, require


class Compensation(NamedTuple):
    """The mask used (True = keep) and the error e of every weight, which the columns beyond the block still need."""

    mask: Tensor
    error: Tensor


def compensate_block_(
    weight: Tensor,
    factor: Tensor,
    *,
    n: int | None = None,
    m: int | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Compensation:
    """Mask and error of one column block, after the block was pruned and compensated in place.

    For each column c from left to right (SparseGPT, arXiv:2301.00774, U = factor):
        q = w_c if kept else 0;    e = (w_c - q) / U_cc;    w_j -= e * U_cj for every j > c
    With n:m, when c is a multiple of m, the mask of columns c..c+m-1 keeps the n largest w_j^2 / U_jj^2 of the weights
    as compensated so far; equal scores keep the lower column. Every operation is rounded to fp32 on its own.

    weight   [rows, width] fp32, changed in place; unit column stride, any row stride
    factor   [width, width] fp32, this diagonal block of the upper Cholesky factor U of the inverse Hessian
    n, m     the pattern; or
    mask     [rows, width] bool, True = keep
    returns  mask [rows, width] bool and error [rows, width] fp32 (0 where kept)
    raises   WandappError on a shape or dtype error, or unless exactly one of n:m and mask is given;
             NonFiniteScoreError when a weight or U_cc made an error NaN or Inf
    """
    check_matrix("weight", weight, (torch.float32,))
    check_writable("weight", weight)
    rows, width = weight.shape
    check_like("factor", factor, (width, width), weight.device)
    require((n is None) == (m is None), f"n and m go together, got n={n}, m={m}")
    require((n is None) != (mask is None), "give exactly one of n:m and mask")
    if n is not None and m is not None:
        check_group(n, m, width)
    elif mask is not None:
        require(
            mask.shape == weight.shape and mask.dtype == torch.bool and mask.device == weight.device,
            f"mask must be bool {list(weight.shape)} on {weight.device}, got {mask.dtype} {list(mask.shape)}",
        )
        mask = mask.contiguous()
    return Compensation(*_compensate_block_(weight, factor.contiguous(), n, m, mask, backend))


@torch.library.custom_op("wandapp::compensate_block_", mutates_args=("weight",))
def _compensate_block_(
    weight: Tensor, factor: Tensor, n: int | None, m: int | None, mask: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Launchers `compensate_block_<backend>(weight, factor, *, n, m, mask)` return (mask, error, offender): a new mask
    tensor, and the flat index of the first error that is NaN or Inf, else -1 (an int or a 0-d integer tensor)."""
    launch = dispatch.launcher("compensate_block_", weight.device, backend)
    used, error, offender = launch(weight, factor, n=n, m=m, mask=mask)
    index = int(offender)
    if index >= 0:
        raise NonFiniteScoreError(*divmod(index, weight.shape[1]))
    return used, error


@_compensate_block_.register_fake
def _(weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=torch.bool), weight.new_empty(weight.shape)
