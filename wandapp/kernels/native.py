"""What the launchers of the compiled CPU kernels share: how a tensor looks from `wandapp._C`."""

import os

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 stands for None."""
    return 0 if tensor is None else tensor.data_ptr()


def instruction_set(isa: str | None) -> str:
    """The instruction set to run: an argument (tests), else WANDAPP_ISA, else the widest this machine has."""
    return isa or os.environ.get("WANDAPP_ISA") or "auto"
