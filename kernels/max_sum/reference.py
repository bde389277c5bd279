"""pairwise_max_sum as its equation."""

import torch
from torch import Tensor


def pairwise_max_sum_reference(left: Tensor, right: Tensor) -> Tensor:
    """[rows, other_rows] fp32: one row of `left` at a time."""
    sums = [torch.maximum(row, right).sum(dim=1) for row in left]
    return torch.stack(sums) if sums else left.new_empty(0, right.shape[0])
