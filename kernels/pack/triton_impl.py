"""Packing and unpacking in Triton.

n:m           one pass: the m weights of a group lie in one thread's registers, the kept ones move to the front
unstructured  two passes around a running sum: count each row's non-zeros, then write each row from its offset
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wandapp.errors import BackendUnavailableError
from wandapp.kernels.pack import Packed, require_no_scale
from wandapp.kernels.triton_groups import (
    WIDEST_GROUP,
    columns_of_part,
    empty_bitmask,
    fill_up,
    gather_kept,
    is_nonzero,
    offender_cell,
    pack_mask,
    split_lanes,
    store_bits,
    store_group_bits,
    store_kept,
)

BLOCK_COLS = 1024


def pack_triton(weight: Tensor, *, n: int | None, m: int | None) -> tuple[Tensor, Tensor, Tensor | None, int | Tensor]:
    if n is None:
        return *_pack_rows(weight), -1
    if m > WIDEST_GROUP:
        raise BackendUnavailableError(f"the triton backend holds groups of up to {WIDEST_GROUP} columns, got m={m}")
    rows, cols = weight.shape
    whole_bytes = m in (2, 4, 8, 16)  # bits of whole groups fill bytes
    values = torch.empty(rows, cols // m * n, dtype=weight.dtype, device=weight.device)
    offender = offender_cell(weight.device)
    bits = empty_bitmask(weight) if whole_bytes else torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    if weight.numel():
        tile = pack_tile(cols, m, weight.element_size())
        blocks = triton.cdiv(cols // m, tile["BLOCK_GROUPS"])
        _pack_nm_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]) * blocks,)](
            weight, values, bits.view(torch.int16) if m == 16 else bits, offender, rows, cols, blocks,
            weight.stride(0), N=n, M=m, BITS=whole_bytes, **tile, num_warps=4,
        )  # fmt: skip
    bitmask = bits if whole_bytes else pack_mask(bits)
    return values, bitmask, None, offender.view(torch.int64)


def unpack_triton(packed: Packed, dtype: torch.dtype) -> Tensor:
    require_no_scale(packed, "triton")
    rows, cols = packed.shape
    dense = torch.empty(rows, cols, dtype=dtype, device=packed.values.device)
    if dense.numel():
        values_per_row = 0 if packed.pattern is None else packed.values.shape[1]
        _unpack_kernel[(rows,)](
            packed.values.contiguous(), packed.bitmask.contiguous(), packed.row_offsets, dense, cols, values_per_row,
            BLOCK_COLS=BLOCK_COLS, num_warps=4,
        )  # fmt: skip
    return dense


def pack_tile(cols: int, m: int, itemsize: int) -> dict:
    """Rows and groups of one program's tile, and the columns of a group that one 16-byte load brings."""
    padded_m = max(2, triton.next_power_of_2(m))
    part = min(padded_m, 16 // itemsize)
    groups = min(512 // itemsize // part, triton.next_power_of_2(cols // m))
    return {"M_PADDED": padded_m, "PART": part, "BLOCK_ROWS": 8, "BLOCK_GROUPS": max(groups, 8 // min(padded_m, 8))}


def _pack_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    bitmask = empty_bitmask(weight)
    row_offsets = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    if weight.numel():
        counts = torch.empty(rows, dtype=torch.int32, device=weight.device)
        _mark_nonzeros_kernel[(rows,)](
            weight, bitmask, counts, cols, weight.stride(0), BLOCK_COLS=BLOCK_COLS, num_warps=4
        )
        torch.cumsum(counts, 0, out=row_offsets[1:])
    values = torch.empty(int(row_offsets[-1]), dtype=weight.dtype, device=weight.device)
    if weight.numel():
        _write_nonzeros_kernel[(rows,)](
            weight, row_offsets, values, cols, weight.stride(0), BLOCK_COLS=BLOCK_COLS, num_warps=4
        )
    return values, bitmask, row_offsets


@triton.jit
def _pack_nm_kernel(
    weight_ptr,
    values_ptr,
    output_ptr,  # BITS: the bitmask in words of max(8, M) bits; else bool [rows, cols]
    offender_ptr,
    rows,
    cols,
    column_blocks,
    stride_weight_row,
    N: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    PART: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    block_row = tl.program_id(0) // column_blocks
    first_group = tl.program_id(0) % column_blocks * BLOCK_GROUPS
    groups = cols // M
    offs_rows = (block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    keep_rows = offs_rows < rows

    lanes = ()  # M_PADDED tiles [BLOCK_ROWS, BLOCK_GROUPS], one a column of the group
    for part in tl.static_range(M_PADDED // PART):
        offs_cols, exist = columns_of_part(first_group, part, cols, M, PART, BLOCK_GROUPS)
        weight_ptrs = weight_ptr + offs_rows * stride_weight_row + offs_cols
        weight_tile = tl.load(weight_ptrs, mask=keep_rows & exist, other=0.0)
        lanes = lanes + split_lanes(tl.where(is_nonzero(weight_tile), weight_tile, 0.0), PART)  # -0.0 becomes +0.0

    nonzero = tl.zeros((BLOCK_ROWS, BLOCK_GROUPS), tl.int32)  # as in `fill_up`: bits below, their number above
    for i in tl.static_range(M):
        nonzero += tl.where(is_nonzero(lanes[i]), (1 << i) + 0x10000, 0)
    bits = fill_up(nonzero, ~nonzero & ((1 << M) - 1), N)
    if tl.max(nonzero) >= (N + 1) << 16:
        offs_local = tl.arange(0, BLOCK_ROWS)[:, None] * cols + tl.arange(0, BLOCK_GROUPS)[None, :] * M
        first = tl.min(tl.where(nonzero >= (N + 1) << 16, offs_local, 0x7FFFFFFF))
        first_flat = (block_row * BLOCK_ROWS).to(tl.int64) * cols + first_group * M
        tl.atomic_min(offender_ptr, first_flat + first)

    store_kept(values_ptr, gather_kept(lanes, bits, N, M), first_group, groups, offs_rows, keep_rows, N)
    if BITS:
        store_group_bits(output_ptr, bits, first_group, cols, offs_rows, keep_rows, M)
    else:
        offs_groups = first_group + tl.arange(0, BLOCK_GROUPS)[None, :]
        for i in tl.static_range(M):
            offs_flat = offs_rows * cols + offs_groups * M + i
            tl.store(output_ptr + offs_flat, (bits >> i) & 1, mask=keep_rows & (offs_groups < groups))


@triton.jit
def _mark_nonzeros_kernel(weight_ptr, bitmask_ptr, counts_ptr, cols, stride_weight_row, BLOCK_COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK_COLS,), tl.int32)
    for first_col in range(0, cols, BLOCK_COLS):
        offs_cols = first_col + tl.arange(0, BLOCK_COLS)
        weight_tile = tl.load(weight_ptr + row * stride_weight_row + offs_cols, mask=offs_cols < cols, other=0.0)
        nonzero = is_nonzero(weight_tile)
        store_bits(bitmask_ptr + row * tl.cdiv(cols, 8), nonzero, first_col, cols, BLOCK_COLS)
        count += nonzero.to(tl.int32)
    tl.store(counts_ptr + row, tl.sum(count))


@triton.jit
def _write_nonzeros_kernel(weight_ptr, row_offsets_ptr, values_ptr, cols, stride_weight_row, BLOCK_COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offset = tl.load(row_offsets_ptr + row)
    for first_col in range(0, cols, BLOCK_COLS):
        offs_cols = first_col + tl.arange(0, BLOCK_COLS)
        weight_tile = tl.load(weight_ptr + row * stride_weight_row + offs_cols, mask=offs_cols < cols, other=0.0)
        nonzero = is_nonzero(weight_tile)
        rank = tl.cumsum(nonzero.to(tl.int32), 0)
        tl.store(values_ptr + offset + rank - 1, weight_tile, mask=nonzero)
        offset += tl.max(rank)


@triton.jit
def _unpack_kernel(values_ptr, bitmask_ptr, row_offsets_ptr, dense_ptr, cols, values_per_row, BLOCK_COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row_offsets_ptr is None:
        offset = row * values_per_row
    else:
        offset = tl.load(row_offsets_ptr + row)
    for first_col in range(0, cols, BLOCK_COLS):
        offs_cols = first_col + tl.arange(0, BLOCK_COLS)
        inside = offs_cols < cols
        byte = tl.load(bitmask_ptr + row * tl.cdiv(cols, 8) + offs_cols // 8, mask=inside, other=0).to(tl.int32)
        kept = (byte >> (offs_cols % 8)) & 1
        rank = tl.cumsum(kept, 0)
        weight_tile = tl.load(values_ptr + offset + rank - 1, mask=kept != 0, other=0.0)
        tl.store(dense_ptr + row * cols + offs_cols, weight_tile, mask=inside)
        offset += tl.max(rank)
