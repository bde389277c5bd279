"""rmsprop_ in C++."""

import torch
from torch import Tensor

from wandapp import _C
from wandapp.kernels.native import DTYPE_CODES, address, instruction_set


def rmsprop_cpu(
    weight: Tensor,
    gradient: Tensor,
    mean_square: Tensor,
    lr: float,
    decay: float,
    epsilon: float,
    *,
    isa: str | None = None,
) -> None:
    """20 bytes of memory traffic per fp32 weight."""
    tensors = address(weight), address(gradient), DTYPE_CODES[gradient.dtype], address(mean_square), weight.numel()
    _C.rmsprop(*tensors, lr, decay, epsilon, torch.get_num_threads(), instruction_set(isa))
