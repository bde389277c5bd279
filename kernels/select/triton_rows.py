"""Row kernels: one program holds a whole row, its scores become integers of the same order, and a search over those
integers finds a threshold that exactly `keep` of them reach. Nothing is sorted. Rows too wide for one program go through
a radix search that reads the weight once per 8 bits of the key."""

import triton
import triton.language as tl

from wandapp.kernels.select.triton_nm import first_nonfinite, score_of
from wandapp.kernels.triton_groups import is_nonzero, store_bits


@triton.jit
def ordered_key(score):
    """int32 whose order is the score's order; -0.0 and +0.0 give one key."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
