"""Packing in C++."""

import torch
from torch import Tensor

from wandapp import _C
from wandapp.kernels.native import DTYPE_CODES, address, instruction_set
from wandapp.kernels.pack import Packed


def pack_cpu(
    weight: Tensor, *, n: int | None, m: int | None, isa: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    rows, cols = weight.shape
    bitmask = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    run = (torch.get_num_threads(), instruction_set(isa))
    if n is not None:
        values = weight.new_empty(rows, cols // m * n)
        return values, bitmask, None, _C.pack_nm(_pack_args(weight, values, bitmask), n, m, *run)
    row_offsets = torch.zeros(rows + 1, dtype=torch.int64)
    _C.count_nonzeros(_pack_args(weight, None, bitmask), address(row_offsets[1:]), *run)
    row_offsets.cumsum_(0)
    values = weight.new_empty(int(row_offsets[-1]))
    _C.pack_nonzeros(_pack_args(weight, values, bitmask), address(row_offsets), *run)
    return values, bitmask, row_offsets, -1


def unpack_cpu(packed: Packed, dtype: torch.dtype, *, isa: str | None = None) -> Tensor:
    return unpack_rows(packed, 0, packed.shape[0], packed.values.new_empty(packed.shape, dtype=dtype), isa=isa)


def unpack_rows(packed: Packed, first_row: int, end_row: int, out: Tensor, *, isa: str | None = None) -> Tensor:
    """`out`, after dense rows first_row..end_row - 1 were written to it."""
    weight = packed_weight(packed)
    run = (torch.get_num_threads(), instruction_set(isa))
    _C.unpack(weight, DTYPE_CODES[out.dtype], first_row, end_row, address(out), *run)
    return out


def packed_weight(packed: Packed) -> _C.PackedWeight:
    """How `wandapp._C` sees a packed weight. It holds addresses: keep `packed` alive while it is used."""
    rows, cols = packed.shape
    n, m = packed.pattern or (0, 0)
    return _C.PackedWeight(
        values=address(packed.values),
        bitmask=address(packed.bitmask),
        row_offsets=address(packed.row_offsets),
        scale=address(packed.scale),
        value_count=packed.values.numel(),
        n=n,
        m=m,
        dtype=DTYPE_CODES[packed.values.dtype],
        rows=rows,
        cols=cols,
    )


def _pack_args(weight: Tensor, values: Tensor | None, bitmask: Tensor) -> _C.PackArgs:
    return _C.PackArgs(
        weight=address(weight),
        weight_stride=weight.stride(0),
        dtype=DTYPE_CODES[weight.dtype],
        rows=weight.shape[0],
        cols=weight.shape[1],
        values=address(values),
        bitmask=address(bitmask),
    )
