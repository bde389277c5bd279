"""What several ops' Triton kernels share: groups of lanes in registers, bits, and the cell that names an offender."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST_GROUP = 16  # lanes of the sorting network, and bits of the half word that collects a group's choice
CELLS = 1024
_cells: dict[torch.device, Iterator[Tensor]] = {}


def offender_cell(device: torch.device) -> Tensor:
    """0-d uint64 in which every bit is set: above every index for `tl.atomic_min`, and -1 to whoever reads it as int64.

    A fill is a launch of about 2 us beside kernels of 20, so cells are filled CELLS at a time; none is given out twice.
    A call captured in a CUDA graph keeps its cell: it then holds the least index of all replays.
    """
    cell = next(_cells.get(device, iter(())), None)
    if cell is None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        count = 1 if capturing else CELLS
        filled = torch.full((count, 2), -1, dtype=torch.int64, device=device)
        cells = iter(filled[:, 0].view(torch.uint64).unbind())  # 16 bytes apart: one alignment, so one compiled kernel
        cell = next(cells)
        if not capturing:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # the next cell may go to another stream
            _cells[device] = cells
    return cell


def empty_bitmask(weight: Tensor) -> Tensor:
    """uint8 [rows, ceil(cols / 8)], not initialised."""
    return torch.empty(weight.shape[0], (weight.shape[1] + 7) // 8, dtype=torch.uint8, device=weight.device)


def pack_mask(mask: Tensor) -> Tensor:
    """uint8 [rows, ceil(cols / 8)] from contiguous bool [rows, cols]."""
    rows, cols = mask.shape
    bitmask = empty_bitmask(mask)
    if mask.numel():
        grid = (rows, triton.cdiv(cols, 2048))
        _pack_mask_kernel[grid](mask.view(torch.uint8), bitmask, cols, BLOCK_COLS=2048, num_warps=4)
    return bitmask


@triton.jit
def columns_of_part(first_group, part: tl.constexpr, cols, M: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr):
    """Columns [1, GROUPS * PART] of lanes part * PART ... of GROUPS groups, and whether there are such columns."""
    offs_slots = tl.arange(0, GROUPS * PART)[None, :]
    if PART == M:
        offs_cols = first_group * M + offs_slots
        return offs_cols, offs_cols < cols
    else:
        lane = part * PART + offs_slots % PART
        offs_cols = (first_group + offs_slots // PART) * M + lane
        return offs_cols, (offs_cols < cols) & (lane < M)


@triton.jit
def widen(tile):
    """fp32 of the tile. bf16 is shifted into place, which is what the hardware does; the interpreter's own conversion
    loses denormals."""
    if tile.dtype == tl.bfloat16:
        return (tile.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tile.to(tl.float32)


@triton.jit
def is_nonzero(tile):
    """False for -0.0 too. In fp32, because the interpreter compares bf16 as integers."""
    return widen(tile) != 0


@triton.jit
def split_lanes(tile, COUNT: tl.constexpr):
    """Tuple of COUNT tiles [rows, columns / COUNT]: tile l holds columns l, l + COUNT, ... of tile [rows, columns]."""
    if COUNT == 1:
        return (tile,)
    else:
        even, odd = tl.split(tile.reshape(tile.shape[0], tile.shape[1] // 2, 2))
        evens = split_lanes(even, COUNT // 2)
        odds = split_lanes(odd, COUNT // 2)
        lanes = ()
        for i in tl.static_range(COUNT // 2):
            lanes = lanes + (evens[i], odds[i])
        return lanes


@triton.jit
def weave(lanes, COUNT: tl.constexpr):
    """Tile [rows, columns * COUNT] whose columns l, l + COUNT, ... are lane l."""
    if COUNT == 1:
        return lanes[0]
    else:
        evens = weave(lanes[::2], COUNT // 2)
        odds = weave(lanes[1::2], COUNT // 2)
        return tl.join(evens, odds).reshape(evens.shape[0], evens.shape[1] * 2)


@triton.jit
def _merge(left, right, COUNT: tl.constexpr):
    """Tuple of 2 * COUNT tiles, elementwise descending, from two descending tuples (Batcher's odd-even merge)."""
    if COUNT == 1:
        return (tl.maximum(left[0], right[0]), tl.minimum(left[0], right[0]))
    else:
        even = _merge(left[::2], right[::2], COUNT // 2)
        odd = _merge(left[1::2], right[1::2], COUNT // 2)
        merged = (even[0],)
        for i in tl.static_range(COUNT - 1):
            merged = merged + (tl.maximum(even[i + 1], odd[i]), tl.minimum(even[i + 1], odd[i]))
        return merged + (odd[COUNT - 1],)


@triton.jit
def _descending(lanes, COUNT: tl.constexpr):
    """Tuple of the COUNT tiles' elements in descending order; whatever the caller ignores is never computed."""
    if COUNT == 1:
        return lanes
    else:
        left = _descending(lanes[: COUNT // 2], COUNT // 2)
        right = _descending(lanes[COUNT // 2 :], COUNT // 2)
        return _merge(left, right, COUNT // 2)


@triton.jit
def keep_bits(lanes, N: tl.constexpr, COUNT: tl.constexpr):
    """int32 with bit l set where lane l is among the N largest of COUNT <= 16; equal lanes: the lower one."""
    if N == 2 and COUNT == 4:
        return keep_bits_24(lanes)
    else:
        threshold = _descending(lanes, COUNT)[N - 1]
        above = tl.zeros(
            threshold.shape, tl.int32
        )  # bits 0..15: lanes above the threshold; bits 16..: how many they are
        equal = tl.zeros(threshold.shape, tl.int32)
        for i in tl.static_range(COUNT):
            above += tl.where(lanes[i] > threshold, (1 << i) + 0x10000, 0)
            equal += tl.where(lanes[i] == threshold, 1 << i, 0)
        return fill_up(above, equal, N)


@triton.jit
def keep_bits_24(lanes):
    """`keep_bits` of 2:4: a lane stays when it beats two of its three rivals. 6 comparisons and 4 majorities."""
    a, b, c, d = lanes
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d  # the lower lane beats its equal
    bits = tl.where(majority(ab, ac, ad), 1, 0) | tl.where(majority(~ab, bc, bd), 2, 0)
    return bits | tl.where(majority(~ac, ~bc, cd), 4, 0) | tl.where(majority(~ad, ~bd, ~cd), 8, 0)


@triton.jit
def majority(a, b, c):
    return (a & b) | (a & c) | (b & c)


@triton.jit
def fill_up(above, spare, N: tl.constexpr):
    """Low half of `above` (its high half counts the bits), filled up to N bits with the lowest bits of `spare`."""
    bits = above & 0xFFFF
    for i in tl.static_range(N):
        lowest = spare & -spare
        bits |= tl.where((above >> 16) + i < N, lowest, 0)
        spare ^= lowest
    return bits


@triton.jit
def gather_kept(lanes, bits, N: tl.constexpr, COUNT: tl.constexpr):
    """Tuple of N tiles: the k-th kept weight of every group, where `bits` has N of its COUNT lowest bits set."""
    kept = ()
    left = bits
    for k in tl.static_range(N):
        lowest = left & -left
        tile = lanes[k]
        for i in tl.static_range(k + 1, k + COUNT - N + 1):
            tile = tl.where(lowest == 1 << i, lanes[i], tile)
        kept = kept + (tile,)
        left ^= lowest
    return kept


@triton.jit
def bytes_of(bits, WIDTH: tl.constexpr):
    """Joins neighbouring WIDTH-bit fields of bits [rows, fields] into bytes; wider fields stay."""
    if WIDTH >= 8:
        return bits
    else:
        fields = split_lanes(bits, 8 // WIDTH)
        joined = fields[0]
        for i in tl.static_range(1, 8 // WIDTH):
            joined |= fields[i] << (i * WIDTH)
        return joined


@triton.jit
def spread_bits(bits, COUNT: tl.constexpr):
    """bool [rows, fields * COUNT]: bit i of every field of bits [rows, fields]."""
    place = tl.arange(0, COUNT)[None, None, :]
    return ((bits[:, :, None] >> place) & 1).reshape(bits.shape[0], bits.shape[1] * COUNT) != 0


@triton.jit
def store_kept(values_ptr, kept, first_group, groups, offs_rows, keep_rows, N: tl.constexpr):
    """Stores kept, N tiles [rows, groups of the tile], to values [rows, groups * N] from group first_group on."""
    GROUPS: tl.constexpr = kept[0].shape[1]
    values_row_ptrs = values_ptr + offs_rows * (groups * N)
    if N & (N - 1) == 0:
        offs_values = first_group * N + tl.arange(0, GROUPS * N)[None, :]
        tl.store(values_row_ptrs + offs_values, weave(kept, N), mask=keep_rows & (offs_values < groups * N))
    else:
        offs_groups = first_group + tl.arange(0, GROUPS)[None, :]
        for k in tl.static_range(N):
            tl.store(values_row_ptrs + offs_groups * N + k, kept[k], mask=keep_rows & (offs_groups < groups))


@triton.jit
def store_group_bits(bitmask_ptr, bits, first_group, cols, offs_rows, keep_rows, M: tl.constexpr):
    """Stores bits [rows, groups of the tile], M = 2, 4, 8 or 16 a group, to the bitmask in words of max(8, M) bits."""
    GROUPS: tl.constexpr = bits.shape[1]
    WORD: tl.constexpr = max(M, 8)
    offs_groups = first_group + tl.arange(0, GROUPS)[None, :]
    offs_words = first_group * M // WORD + tl.arange(0, GROUPS * M // WORD)[None, :]
    words = tl.cdiv(cols, WORD)
    joined = bytes_of(tl.where(offs_groups < cols // M, bits, 0), M)
    tl.store(bitmask_ptr + offs_rows * words + offs_words, joined, mask=keep_rows & (offs_words < words))


@triton.jit
def store_bits(bitmask_row_ptr, kept, first_col, cols, BLOCK_COLS: tl.constexpr):
    """Stores kept [BLOCK_COLS] as bits of the bytes from column first_col on; kept must be False beyond cols."""
    fields = kept.to(tl.int32).reshape(1, BLOCK_COLS)
    offs_bytes = first_col // 8 + tl.arange(0, BLOCK_COLS // 8)[None, :]
    tl.store(bitmask_row_ptr + offs_bytes, bytes_of(fields, 1), mask=offs_bytes < tl.cdiv(cols, 8))


@triton.jit
def _pack_mask_kernel(mask_ptr, bitmask_ptr, cols, BLOCK_COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_COLS
    offs_cols = first_col + tl.arange(0, BLOCK_COLS)
    kept = tl.load(mask_ptr + row * cols + offs_cols, mask=offs_cols < cols, other=0)
    store_bits(bitmask_ptr + row * tl.cdiv(cols, 8), kept, first_col, cols, BLOCK_COLS)
