"""Packing on the GPU: one pass from a dense weight to its kept values and a bitmask, or a GPU library's metadata."""

import torch
from torch import Tensor

from wandapp.errors import BackendUnavailableError
from wandapp.kernels.native import DTYPE_CODES, address, aligned
from wandapp.kernels.pack import Packed

LAYOUTS = {"neutral": 0, "cutlass": 1, "cusparselt": 2}
NO_OFFENDER = torch.iinfo(torch.int64).max


def compress24(
    weight: Tensor, bitmask: Tensor | None = None, *, layout: str = "neutral", offender: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, metadata, offender) of a 2:4 weight, or of `weight` where `bitmask` is set. Does not wait for the GPU.

    neutral     metadata is the bitmask, uint8 [rows, ceil(cols / 8)]
    cutlass     metadata is int16 [rows, cols / 16] as torch.sparse has it; rows a multiple of 32, cols of 64
    cusparselt  the same words in the order assumed of cuSPARSELt, to be used only where `knows_cusparselt_order`; rows and
                cols multiples of 128 (both for 16-bit weights only)
    offender    0-d int64: flat index of the first group with more than two non-zeros, NO_OFFENDER when there is none. One
                given is lowered, not set: calls can share it and look once at the end
    """
    from wandapp import _CUDA

    rows, cols = weight.shape
    values = weight.new_empty(rows, cols // 2)
    if layout == "neutral":
        metadata = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8, device=weight.device)
    else:
        metadata = torch.empty(rows, cols // 16, dtype=torch.int16, device=weight.device)
        weight, bitmask = aligned(weight), None if bitmask is None else aligned(bitmask)
    if offender is None:
        offender = torch.full((), NO_OFFENDER, dtype=torch.int64, device=weight.device)
    with torch.cuda.device_of(weight):
        stream = torch.cuda.current_stream()
        _CUDA.compress24(
            address(weight), weight.stride(0), address(bitmask), rows, cols, DTYPE_CODES[weight.dtype], LAYOUTS[layout],
            address(values), address(metadata), address(offender), stream.device_index, stream.cuda_stream,
        )  # fmt: skip
    return values, metadata, offender


def pack_cuda(weight: Tensor, *, n: int | None, m: int | None) -> tuple[Tensor, Tensor, None, int]:
    if (n, m) != (2, 4):
        raise BackendUnavailableError("pack: backend 'cuda' packs 2:4 only; use 'triton' for other patterns")
    values, bitmask, offender = compress24(weight)
    first = int(offender)
    return values, bitmask, None, -1 if first == NO_OFFENDER else first


def unpack_cuda(packed: Packed, dtype: torch.dtype) -> Tensor:
    raise BackendUnavailableError("unpack: there is no CUDA kernel for it; use backend 'triton'")
