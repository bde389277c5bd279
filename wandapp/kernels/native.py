"""What the launchers of the compiled kernels share: how a tensor looks from `wandapp._C` and `wandapp._CUDA`."""

import os

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 stands for None."""
    return 0 if tensor is None else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if it is not contiguous from a 16-byte boundary on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def instruction_set(isa: str | None) -> str:
    """The instruction set to run: an argument (tests), else WANDAPP_ISA, else the widest this machine has."""
    return isa or os.environ.get("WANDAPP_ISA") or "auto"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for products of bf16, which then are faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    from wandapp import _C

    return _C.isa_runs_here("avx512bf16")
