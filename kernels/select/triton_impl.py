"""Fused score and choice in Triton.

n:m   a tile of rows x columns is read once; the m scores of a group lie in one thread's registers, a sorting network
      finds the n-th largest, and a running count gives equal scores to the lower columns.
rows  one program holds a whole row: its scores become integers of the same order, and a search over those integers
      finds a threshold that exactly `keep` of them reach. Nothing is sorted. Rows too wide for one program go through
      a radix search that reads the weight once per 8 bits of the key.

Every kernel is launched with `enable_fp_fusion=False`: a fused multiply-add would change scores by one ulp.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wandapp.errors import BackendUnavailableError

WIDEST_GROUP = 16  # lanes of the sorting network, and bits of the half word that collects a group's choice
WIDEST_ROW = 32768  # 64 keys in each of 512 threads
CELLS = 1024
_cells: dict[torch.device, Iterator[Tensor]] = {}


def select_nm_triton(weight, column_scale, gradient, *, n, m, alpha) -> tuple[Tensor, Tensor]:
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    return mask, _launch_nm(weight, column_scale, gradient, mask, n, m, alpha, prune=False)


def prune_nm_triton(weight, column_scale, gradient, *, n, m, alpha) -> tuple[Tensor, Tensor]:
    if m in (2, 4, 8, 16):  # bits of whole groups fill bytes
        bitmask = _empty_bitmask(weight)
        return bitmask, _launch_nm(weight, column_scale, gradient, bitmask, n, m, alpha, prune=True)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    offender = _launch_nm(weight, column_scale, gradient, mask, n, m, alpha, prune=True)
    return pack_mask(mask), offender


def select_rows_triton(weight, column_scale, gradient, *, keep, alpha) -> tuple[Tensor, Tensor]:
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    return mask, _launch_rows(weight, column_scale, gradient, mask, keep, alpha, prune=False)


def prune_rows_triton(weight, column_scale, gradient, *, keep, alpha) -> tuple[Tensor, Tensor]:
    bitmask = _empty_bitmask(weight)
    return bitmask, _launch_rows(weight, column_scale, gradient, bitmask, keep, alpha, prune=True)


def pack_mask(mask: Tensor) -> Tensor:
    """uint8 [rows, ceil(cols / 8)] from contiguous bool [rows, cols]."""
    rows, cols = mask.shape
    bitmask = _empty_bitmask(mask)
    if mask.numel():
        grid = (rows, triton.cdiv(cols, 2048))
        _pack_mask_kernel[grid](mask.view(torch.uint8), bitmask, cols, BLOCK_COLS=2048, num_warps=4)
    return bitmask


def nm_tile(cols: int, m: int, itemsize: int, prune: bool) -> dict:
    """Rows and groups of one program's tile, and the columns of a group that one 16-byte load brings.

    A program is one warp: no warp waits for another in the search for a NaN. 16 bf16 weights a thread, or 32 where
    their registers are not needed to write the weights back.
    """
    padded_m = max(2, triton.next_power_of_2(m))
    part = min(padded_m, 16 // itemsize)
    groups = min(512 // itemsize // part, triton.next_power_of_2(cols // m))  # 32 threads along the columns
    return {
        "M_PADDED": padded_m,
        "PART": part,
        "BLOCK_ROWS": 2 if prune or m > 8 else 4,
        "BLOCK_GROUPS": max(groups, 8 // min(padded_m, 8)),
        "num_warps": 1,
    }


def row_tile(cols: int, itemsize: int) -> dict:
    """Parts of one program's row buffer, and its warps: 8 keys a thread and part, 3 to 8 parts.

    Parts waste less than one power of two would: 11008 columns take 6 parts of 2048. Long rows are read again, from L2,
    to be written: 128 registers a thread then hold the keys, and two to four programs share an SM.
    """
    part = max(256, triton.next_power_of_2(cols) // (8 if cols > 8192 else 4))
    registers = {"maxnreg": 128} if part >= 1024 else {}
    return {
        "PARTS": triton.cdiv(cols, part),
        "PART": part,
        "RELOAD": part >= 1024,
        "num_warps": part // 256,
        **registers,
    }


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


def _launch_nm(weight, column_scale, gradient, output, n, m, alpha, *, prune) -> Tensor:
    if m > WIDEST_GROUP:
        raise BackendUnavailableError(f"the triton backend holds groups of up to {WIDEST_GROUP} columns, got m={m}")
    rows, cols = weight.shape
    offender = offender_cell(weight.device)
    if weight.numel():
        tile = nm_tile(cols, m, weight.element_size(), prune)
        bits = output.dtype == torch.uint8
        blocks = triton.cdiv(cols // m, tile["BLOCK_GROUPS"])
        output = output.view(torch.int16 if m == 16 and bits else torch.uint8)
        _select_nm_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]) * blocks,)](
            weight, column_scale, gradient, output, offender, float(alpha), rows, cols, blocks,
            weight.stride(0), _row_stride(gradient), N=n, M=m, PRUNE=prune, BITS=bits, **tile,
            enable_fp_fusion=False,
        )  # fmt: skip
    return offender.view(torch.int64)


def _launch_rows(weight, column_scale, gradient, output, keep, alpha, *, prune) -> Tensor:
    rows, cols = weight.shape
    offender = offender_cell(weight.device)
    if weight.numel():
        terms = (weight, column_scale, gradient, _bytes(output), offender, float(alpha), cols, keep)
        strides = (weight.stride(0), _row_stride(gradient), output.stride(0))
        shift = _unused_key_bits(weight, column_scale, gradient)
        if cols > WIDEST_ROW:
            _launch_wide_rows(terms, strides, shift, prune)
        else:
            _select_rows_kernel[(rows,)](
                *terms, *strides, KEY_SHIFT=shift, PRUNE=prune, **row_tile(cols, weight.element_size()),
                enable_fp_fusion=False,
            )  # fmt: skip
    return offender.view(torch.int64)


def _launch_wide_rows(terms, strides, shift, prune) -> None:
    """Radix search, highest byte of the key first: each pass counts the keys that agree with the bytes found so far."""
    weight, column_scale, gradient, output, offender, alpha, cols, keep = terms
    rows, device = weight.shape[0], weight.device
    found = torch.zeros(rows, dtype=torch.int32, device=device)  # the bytes found so far, as one integer
    wanted = torch.full((rows,), keep, dtype=torch.int64, device=device)  # still to keep among keys that agree
    block, steps = 2048, 8
    options = {"BLOCK_COLS": block, "num_warps": 4, "enable_fp_fusion": False}
    source = (weight, column_scale, gradient)
    for digit_shift in (24, 16, 8, 0):
        counts = torch.zeros(rows, 256, dtype=torch.int32, device=device)
        _count_digits_kernel[(triton.cdiv(cols, block * steps), rows)](
            *source, counts, found, offender, alpha, cols, *strides[:2], DIGIT_SHIFT=digit_shift, STEPS=steps, **options
        )
        larger = counts.flip(1).cumsum(1).flip(1) - counts  # keys with a larger digit than the one in this column
        digit = (larger >= wanted[:, None]).sum(1, keepdim=True).clamp_(max=255)
        wanted -= larger.gather(1, digit)[:, 0]
        found = (found << 8) | digit[:, 0].int()
    tiles = triton.cdiv(cols, block)
    ties = torch.empty(rows, tiles, dtype=torch.int64, device=device)
    _count_ties_kernel[(tiles, rows)](*source, ties, found, alpha, cols, *strides[:2], **options)
    before = ties.cumsum(1) - ties
    _write_wide_rows_kernel[(tiles, rows)](
        *source, output, before, found, wanted, alpha, cols, *strides, PRUNE=prune, **options
    )


def _empty_bitmask(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape[0], (weight.shape[1] + 7) // 8, dtype=torch.uint8, device=weight.device)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _unused_key_bits(weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None) -> int:
    """Low bits of a score that are 0 because the score is the weight's own magnitude: fewer steps of the search."""
    if column_scale is not None or gradient is not None:
        return 0
    return {torch.bfloat16: 16, torch.float16: 13}.get(weight.dtype, 0)


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
def score_of(weight_tile, column_scale_ptr, gradient_ptr, offs_cols, offs_gradient, inside, alpha):
    """|weight| * (alpha * gradient + column_scale) in fp32, each operation rounded."""
    magnitude = tl.abs(widen(weight_tile))
    if column_scale_ptr is None:
        if gradient_ptr is None:
            return magnitude
        else:
            return magnitude * (alpha * tl.load(gradient_ptr + offs_gradient, mask=inside, other=0.0) + 1.0)
    else:
        column_scale = tl.load(column_scale_ptr + offs_cols, mask=inside, other=0.0)
        if gradient_ptr is None:
            return magnitude * column_scale
        else:
            gradient = tl.load(gradient_ptr + offs_gradient, mask=inside, other=0.0)
            return magnitude * (alpha * gradient + column_scale)


@triton.jit
def first_nonfinite(score, offs_local):
    """Least offs_local whose score is NaN or Inf, else 0x7FFFFFFF. The search runs only in a tile that has one."""
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    first = 0x7FFFFFFF
    if tl.max(bits) >= 0x7F800000:
        first = tl.min(tl.where(bits >= 0x7F800000, offs_local, 0x7FFFFFFF))
    return first


@triton.jit
def ordered_key(score):
    """int32 whose order is the score's order; -0.0 and +0.0 give one key."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
def _select_nm_kernel(
    weight_ptr,
    column_scale_ptr,
    gradient_ptr,
    output_ptr,  # BITS: the bitmask in words of max(8, M) bits; else bool [rows, cols]
    offender_ptr,
    alpha,
    rows,
    cols,
    column_blocks,
    stride_weight_row,
    stride_gradient_row,
    N: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    PART: tl.constexpr,
    PRUNE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    block_row = tl.program_id(0) // column_blocks
    first_group = tl.program_id(0) % column_blocks * BLOCK_GROUPS
    groups = cols // M
    offs_rows = (block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    offs_slots = tl.arange(0, BLOCK_GROUPS * PART)[None, :]

    # Each part is one tile [BLOCK_ROWS, BLOCK_GROUPS * PART]: PART neighbouring columns of every group.
    weights, lanes, columns = (), (), ()
    bad = 0x7FFFFFFF  # least row of the tile * cols + column whose score is NaN or Inf
    for part in tl.static_range(M_PADDED // PART):
        if PART == M:
            offs_cols = first_group * M + offs_slots
            inside = (offs_rows < rows) & (offs_cols < cols)
        else:
            lane = part * PART + offs_slots % PART
            offs_cols = (first_group + offs_slots // PART) * M + lane
            inside = (offs_rows < rows) & (offs_cols < cols) & (lane < M)
        weight_tile = tl.load(weight_ptr + offs_rows * stride_weight_row + offs_cols, mask=inside, other=0.0)
        offs_gradient = offs_rows * stride_gradient_row + offs_cols
        score = score_of(weight_tile, column_scale_ptr, gradient_ptr, offs_cols, offs_gradient, inside, alpha)
        bad = tl.minimum(bad, first_nonfinite(score, tl.arange(0, BLOCK_ROWS)[:, None] * cols + offs_cols))
        if M != M_PADDED:
            score = tl.where(part * PART + offs_slots % PART < M, score, float("-inf"))
        weights, columns = weights + (weight_tile,), columns + ((offs_cols, inside),)
        lanes = lanes + split_lanes(score, PART)
    if bad != 0x7FFFFFFF:
        tl.atomic_min(offender_ptr, (block_row * BLOCK_ROWS).to(tl.int64) * cols + bad)

    bits = keep_bits(lanes, N, M_PADDED)  # [BLOCK_ROWS, BLOCK_GROUPS]
    for part in tl.static_range(M_PADDED // PART):
        offs_cols, inside = columns[part]
        keep = spread_bits(bits >> (part * PART), PART)
        if PRUNE:
            kept = tl.where(keep & is_nonzero(weights[part]), weights[part], 0.0)
            tl.store(weight_ptr + offs_rows * stride_weight_row + offs_cols, kept, mask=inside)
        if not BITS:
            tl.store(output_ptr + offs_rows * cols + offs_cols, keep.to(tl.int8), mask=inside)
    if BITS:
        WORD: tl.constexpr = max(M, 8)
        WORDS: tl.constexpr = BLOCK_GROUPS * M // WORD
        offs_groups = first_group + tl.arange(0, BLOCK_GROUPS)[None, :]
        offs_words = first_group * M // WORD + tl.arange(0, WORDS)[None, :]
        words = tl.cdiv(cols, WORD)
        bits = bytes_of(tl.where(offs_groups < groups, bits, 0), M)
        tl.store(output_ptr + offs_rows * words + offs_words, bits, mask=(offs_rows < rows) & (offs_words < words))


@triton.jit
def _select_rows_kernel(
    weight_ptr,
    column_scale_ptr,
    gradient_ptr,
    output_ptr,  # PRUNE: the bitmask; else bool [rows, cols]
    offender_ptr,
    alpha,
    cols,
    keep,
    stride_weight_row,
    stride_gradient_row,
    stride_output_row,
    KEY_SHIFT: tl.constexpr,
    PRUNE: tl.constexpr,
    RELOAD: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight_row_ptr = weight_ptr + row * stride_weight_row
    weights, keys = (), ()
    lowest = tl.full((PART,), 0x7FFFFFFF, tl.int32)
    highest = tl.full((PART,), -0x80000000, tl.int32)
    for part in tl.static_range(PARTS):
        offs_cols = part * PART + tl.arange(0, PART)
        inside = offs_cols < cols
        weight_tile = tl.load(weight_row_ptr + offs_cols, mask=inside, other=0.0)
        offs_gradient = row * stride_gradient_row + offs_cols
        score = score_of(weight_tile, column_scale_ptr, gradient_ptr, offs_cols, offs_gradient, inside, alpha)
        key = ordered_key(score) >> KEY_SHIFT
        lowest = tl.minimum(lowest, tl.where(inside, key, 0x7FFFFFFF))
        key = tl.where(inside, key, -0x80000000)  # below every number, so that empty slots never count
        highest = tl.maximum(highest, key)
        weights, keys = weights + (weight_tile,), keys + (key,)
    low, high = tl.min(lowest), tl.max(highest)

    INFINITE: tl.constexpr = 0x7F800000 >> KEY_SHIFT  # key of +Inf; NaN lies above, -Inf is its complement
    if (high >= INFINITE) | (low <= ~INFINITE):
        bad = tl.full((PART,), 0x7FFFFFFF, tl.int32)
        for part in tl.static_range(PARTS):
            offs_cols = part * PART + tl.arange(0, PART)
            infinite = (keys[part] >= INFINITE) | ((keys[part] <= ~INFINITE) & (offs_cols < cols))
            bad = tl.minimum(bad, tl.where(infinite, offs_cols, 0x7FFFFFFF))
        tl.atomic_min(offender_ptr, row * cols + tl.min(bad))

    # reach(t) = number of keys >= t. Always reach(low) > keep >= reach(high), until reach(high) == keep or only keys
    # equal to low lie between. Two steps go where a straight line would put `keep`,
    # the third to the middle: about 9 in all.
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    reach_low, reach_high = cols, 0
    if keep == cols:
        high, reach_high = low, cols
    step = 0
    while (reach_high != keep) & (high - low > 1):
        fraction = tl.where(step % 3 != 2, (reach_low - keep).to(tl.float32) / (reach_low - reach_high), 0.5)
        jump = ((high - low).to(tl.float32) * fraction).to(tl.int64)
        middle = low + tl.minimum(tl.maximum(jump, 1), high - low - 1)
        reached = tl.zeros((PART,), tl.float32)  # exact, and two instructions a key fewer than a sum of integers
        for part in tl.static_range(PARTS):
            reached += (keys[part] >= middle.to(tl.int32)).to(tl.float32)
        reach = tl.sum(reached).to(tl.int32)
        too_many = reach > keep
        low, reach_low = tl.where(too_many, middle, low), tl.where(too_many, reach, reach_low)
        high, reach_high = tl.where(too_many, high, middle), tl.where(too_many, reach_high, reach)
        step += 1

    # Of the keys equal to low, those left of column `edge` stay.
    tied_key, sure_key = low.to(tl.int32), high.to(tl.int32)
    edge, right = 0, cols
    while (reach_high != keep) & (edge < right):
        middle_col = (edge + right) // 2
        tied = tl.zeros((PART,), tl.int32)
        for part in tl.static_range(PARTS):
            tied += ((keys[part] == tied_key) & (part * PART + tl.arange(0, PART) < middle_col)).to(tl.int32)
        enough = reach_high + tl.sum(tied) >= keep
        right, edge = tl.where(enough, middle_col, right), tl.where(enough, edge, middle_col + 1)

    output_row_ptr = output_ptr + row * stride_output_row
    for part in tl.static_range(PARTS):
        offs_cols = part * PART + tl.arange(0, PART)
        inside = offs_cols < cols
        kept = (keys[part] >= sure_key) | ((keys[part] == tied_key) & (offs_cols < edge))
        if PRUNE:
            weight_tile = weights[part]
            if RELOAD:
                weight_tile = tl.load(weight_row_ptr + offs_cols, mask=inside, other=0.0)
            tl.store(
                weight_row_ptr + offs_cols, tl.where(kept & is_nonzero(weight_tile), weight_tile, 0.0), mask=inside
            )
            store_bits(output_row_ptr, kept, part * PART, cols, PART)
        else:
            tl.store(output_row_ptr + offs_cols, kept.to(tl.int8), mask=inside)


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


@triton.jit
def _wide_key(
    weight_tile, column_scale_ptr, gradient_ptr, row, offs_cols, inside, alpha, cols, stride_gradient_row, offender_ptr
):
    """Key of a tile of a wide row, shifted to unsigned order: its bytes are the digits of the radix search."""
    offs_gradient = row * stride_gradient_row + offs_cols
    score = score_of(weight_tile, column_scale_ptr, gradient_ptr, offs_cols, offs_gradient, inside, alpha)
    if offender_ptr is not None:
        bad = first_nonfinite(score, tl.arange(0, offs_cols.shape[0]))
        if bad < offs_cols.shape[0]:
            tl.atomic_min(offender_ptr, row * cols + tl.min(offs_cols) + bad)
    return ordered_key(score) ^ -0x80000000


@triton.jit
def _count_digits_kernel(
    weight_ptr,
    column_scale_ptr,
    gradient_ptr,
    counts_ptr,
    found_ptr,
    offender_ptr,
    alpha,
    cols,
    stride_weight_row,
    stride_gradient_row,
    DIGIT_SHIFT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    found = tl.load(found_ptr + row)
    counts = tl.zeros((256,), tl.int32)
    for step in range(STEPS):
        offs_cols = (tl.program_id(0) * STEPS + step).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        inside = offs_cols < cols
        weight_tile = tl.load(weight_ptr + row * stride_weight_row + offs_cols, mask=inside, other=0.0)
        key = _wide_key(
            weight_tile, column_scale_ptr, gradient_ptr, row, offs_cols, inside, alpha, cols, stride_gradient_row,
            offender_ptr if DIGIT_SHIFT == 24 else None,
        )  # fmt: skip
        agrees = inside
        if DIGIT_SHIFT < 24:
            agrees = inside & ((key >> (DIGIT_SHIFT + 8)) == ((found << (DIGIT_SHIFT + 8)) >> (DIGIT_SHIFT + 8)))
        counts += tl.histogram((key >> DIGIT_SHIFT) & 0xFF, 256, mask=agrees)
    tl.atomic_add(counts_ptr + row * 256 + tl.arange(0, 256), counts, mask=counts != 0)


@triton.jit
def _count_ties_kernel(
    weight_ptr,
    column_scale_ptr,
    gradient_ptr,
    ties_ptr,
    found_ptr,
    alpha,
    cols,
    stride_weight_row,
    stride_gradient_row,
    BLOCK_COLS: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_cols = tile.to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = offs_cols < cols
    weight_tile = tl.load(weight_ptr + row * stride_weight_row + offs_cols, mask=inside, other=0.0)
    key = _wide_key(
        weight_tile, column_scale_ptr, gradient_ptr, row, offs_cols, inside, alpha, cols, stride_gradient_row, None
    )
    ties = tl.sum((inside & (key == tl.load(found_ptr + row))).to(tl.int32))
    tl.store(ties_ptr + row * tl.num_programs(0) + tile, ties)


@triton.jit
def _write_wide_rows_kernel(
    weight_ptr,
    column_scale_ptr,
    gradient_ptr,
    output_ptr,
    before_ptr,
    found_ptr,
    wanted_ptr,
    alpha,
    cols,
    stride_weight_row,
    stride_gradient_row,
    stride_output_row,
    PRUNE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_cols = tile.to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = offs_cols < cols
    weight_ptrs = weight_ptr + row * stride_weight_row + offs_cols
    weight_tile = tl.load(weight_ptrs, mask=inside, other=0.0)
    key = _wide_key(
        weight_tile, column_scale_ptr, gradient_ptr, row, offs_cols, inside, alpha, cols, stride_gradient_row, None
    )
    threshold = tl.load(found_ptr + row)
    tied = inside & (key == threshold)
    left = tl.load(wanted_ptr + row) - tl.load(before_ptr + row * tl.num_programs(0) + tile)
    kept = tied & (tl.cumsum(tied.to(tl.int32)) <= left)
    kept = kept | (inside & ((key ^ -0x80000000) > (threshold ^ -0x80000000)))
    output_row_ptr = output_ptr + row * stride_output_row
    if PRUNE:
        tl.store(weight_ptrs, tl.where(kept & is_nonzero(weight_tile), weight_tile, 0.0), mask=inside)
        store_bits(output_row_ptr, kept, tile.to(tl.int64) * BLOCK_COLS, cols, BLOCK_COLS)
    else:
        tl.store(output_row_ptr + offs_cols, kept.to(tl.int8), mask=inside)
