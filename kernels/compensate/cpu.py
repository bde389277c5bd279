"""SparseGPT's column loop in C++: sixteen rows at a time, no torch call per column."""

import torch
from torch import Tensor

from wandapp import _C
from wandapp.kernels.native import address, instruction_set


def compensate_block_cpu(
    weight: Tensor, factor: Tensor, *, n: int | None, m: int | None, mask: Tensor | None, isa: str | None = None
) -> tuple[Tensor, Tensor, int]:
    rows, width = weight.shape
    used = torch.empty(rows, width, dtype=torch.bool)
    error = torch.empty(rows, width, dtype=torch.float32)
    offender = _C.compensate_block(
        *(address(weight), weight.stride(0), rows, width, address(factor)),
        *(n or 0, m or 0, address(mask), address(used), address(error)),
        torch.get_num_threads(),
        instruction_set(isa),
    )
    return used, error, offender
