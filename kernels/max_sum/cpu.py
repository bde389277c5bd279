"""pairwise_max_sum in C++: tiles of sums in registers, as in a matrix product."""

import torch
from torch import Tensor

from wandapp import _C
from wandapp.kernels.native import address, instruction_set


def pairwise_max_sum_cpu(left: Tensor, right: Tensor, *, isa: str | None = None) -> Tensor:
    """[rows, other_rows] fp32; the result does not depend on the thread count."""
    out = torch.empty(left.shape[0], right.shape[0], dtype=torch.float32)
    matrices = address(left), left.shape[0], address(right), right.shape[0], left.shape[1]
    _C.pairwise_max_sum(*matrices, address(out), torch.get_num_threads(), instruction_set(isa))
    return out
