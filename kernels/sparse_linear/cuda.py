"""The decode kernel: 1 to 16 tokens times a 2:4 weight, on the sparse tensor cores straight from values and bitmask."""

import torch
from torch import Tensor

from wandapp.errors import BackendUnavailableError
from wandapp.kernels.native import DTYPE_CODES, address, aligned
from wandapp.kernels.pack import Packed

MAX_TOKENS = 16
STEP = 64  # columns a warp takes at a time
AUTOMATIC_TOKENS = 8  # on an H100 faster than Triton up to here, but for 4096x11008 at 8 (0.91x); mixed at 16
WALKING_FROM = 1  # tokens; measured on an H100, 11008x4096: walking blocks take 3 % less time at 1 token, 27 % at 8


def obstacle(tokens: int, packed: Packed) -> str:
    """Why the kernel cannot multiply `tokens` tokens by this weight; empty when it can."""
    if packed.pattern != (2, 4):
        return "it multiplies 2:4 weights only"
    if packed.values.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, got {packed.values.dtype}"
    if packed.shape[1] % STEP:
        return f"it needs in_features divisible by {STEP}, got {packed.shape[1]}"
    if not 1 <= tokens <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, got {tokens}"
    return ""


def preference(tokens: int, packed: Packed) -> tuple[str, ...]:
    """Backends for `tokens` tokens on a GPU, best first; one that cannot multiply them is left out."""
    if obstacle(tokens, packed):
        return ("triton",)
    return ("cuda", "triton") if tokens <= AUTOMATIC_TOKENS else ("triton", "cuda")


def sparse_linear_cuda(x: Tensor, packed: Packed, bias: Tensor | None, *, walking: bool | None = None) -> Tensor:
    """y [tokens, rows]. walking: whether blocks walk (sparse_linear.cuh), None = as the number of tokens suggests."""
    from wandapp import _CUDA

    reason = obstacle(len(x), packed)
    if reason:
        raise BackendUnavailableError(f"sparse_linear: backend 'cuda' cannot run: {reason}; use 'triton'")
    rows, cols = packed.shape
    x, values, bitmask = (aligned(tensor) for tensor in (x, packed.values, packed.bitmask))
    y = x.new_empty(len(x), rows)
    walking = len(x) >= WALKING_FROM if walking is None else walking
    with torch.cuda.device_of(x):
        stream = torch.cuda.current_stream()
        _CUDA.sparse_linear24(
            address(x), address(values), address(bitmask), address(bias), address(y), len(x), rows, cols,
            DTYPE_CODES[x.dtype], walking, stream.device_index, stream.cuda_stream,
        )  # fmt: skip
    return y
