"""A matrix product with max in the place of the multiplication: what every exchange of channels is worth, exactly."""

import torch
from torch import Tensor

from wandapp.kernels import dispatch
from wandapp.kernels.checks import check_like, check_matrix, require


def pairwise_max_sum(left: Tensor, right: Tensor, *, backend: str | None = None) -> Tensor:
    """out_ij = sum over r of max(left_ir, right_jr), for every row i of `left` and j of `right`.

    If left_i is the n-th largest score, row by row of a weight, among m - 1 channels, then out_ij is, up to a term of i
    alone, the score that an n:m choice keeps in the group of these channels and j (see `wandapp.permutation`).

    left     [rows, depth] fp32
    right    [other_rows, depth] fp32, on the same device
    returns  [rows, other_rows] fp32, sums formed in fp32
    raises   WandappError on a shape, dtype or device error
    """
    check_matrix("left", left, (torch.float32,))
    check_matrix("right", right, (torch.float32,))
    check_like("right", right, (right.shape[0], left.shape[1]), left.device)
    require(left.shape[1] > 0, "left and right must have columns, got none")
    return _pairwise_max_sum(left.contiguous(), right.contiguous(), backend)


@torch.library.custom_op("wandapp::pairwise_max_sum", mutates_args=())
def _pairwise_max_sum(left: Tensor, right: Tensor, backend: str | None) -> Tensor:
    """Launchers `pairwise_max_sum_<backend>(left, right)` get contiguous matrices of one width."""
    return dispatch.launcher("pairwise_max_sum", left.device, backend)(left, right)


@_pairwise_max_sum.register_fake
def _(left: Tensor, right: Tensor, *_: object) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])
