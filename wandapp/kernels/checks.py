"""Checks shared by the public kernel functions. Each raises a WandappError of one sentence."""

import torch
from torch import Tensor

from wandapp.errors import WandappError

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise WandappError(message)


def check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES) -> None:
    """`tensor` is 2-D and of one of `dtypes`."""
    require(tensor.dim() == 2, f"{name} must be a matrix, got shape {list(tensor.shape)}; reshape it to 2-D")
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require(tensor.dtype in dtypes, f"{name} must be {allowed}, got {tensor.dtype}; convert it first")


def check_like(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """`tensor` is absent, or fp32 of `shape` on `device`."""
    if tensor is None:
        return
    require(
        tuple(tensor.shape) == shape and tensor.dtype == torch.float32 and tensor.device == device,
        f"{name} must be float32 {list(shape)} on {device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}",
    )


def check_writable(name: str, tensor: Tensor) -> None:
    """`tensor` can be changed in place row by row: unit column stride and rows that do not overlap."""
    rows, cols = tensor.shape
    require(
        (tensor.stride(1) == 1 or cols <= 1) and (tensor.stride(0) >= cols or rows <= 1),
        f"{name} must have unit column stride and separate rows, got strides {tensor.stride()}; pass .contiguous()",
    )


def check_group(n: int, m: int, cols: int) -> None:
    """0 < n <= m, and m divides the columns."""
    require(0 < n <= m, f"n:m needs 0 < n <= m, got {n}:{m}")
    require(cols % m == 0, f"{n}:{m} needs columns divisible by {m}, got {cols}; exclude this weight with --skip")


def unit_column_stride(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, copied only if its last axis is not contiguous."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()
