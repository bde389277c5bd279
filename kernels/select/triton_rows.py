"""Row kernels: one program holds the scores of a whole row, and a search finds a threshold that exactly `keep` of them reach.
Nothing is sorted. Rows too wide for one program go through a radix search that reads the weight once per 8 bits of the
score."""

import triton
import triton.language as tl

from wandapp.kernels.select.triton_nm import first_nonfinite, score_of
from wandapp.kernels.triton_groups import is_nonzero, store_bits


@triton.jit
def bits_of(score):
    """int32 with the order of the scores, which are >= 0. NaN and Inf are 0x7F800000 and more."""
    return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


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
    ZERO_BITS: tl.constexpr,  # the lowest bits of every score that are 0
    PRUNE: tl.constexpr,
    RELOAD: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight_row_ptr = weight_ptr + row * stride_weight_row
    weights, scores = (), ()  # scores beyond the row are 0: never counted, as thresholds are larger
    highest = tl.zeros((PART,), tl.float32)
    for part in tl.static_range(PARTS):
        inside = part * PART + tl.arange(0, PART) < cols
        offs_cols = part * PART + tl.arange(0, PART).to(tl.int64)  # in 64 bits the first term costs no instruction
        weight_tile = tl.load(weight_row_ptr + offs_cols, mask=inside, other=0.0)
        offs_gradient = row * stride_gradient_row + offs_cols
        score = score_of(weight_tile, column_scale_ptr, gradient_ptr, offs_cols, offs_gradient, inside, alpha)
        score = tl.abs(score)  # -0.0 too
        highest = tl.maximum(highest, score, propagate_nan=tl.PropagateNan.ALL)
        weights, scores = weights + (weight_tile,), scores + (score,)
    highest_bits = tl.max(bits_of(highest))

    if highest_bits >= 0x7F800000:
        bad = tl.full((PART,), 0x7FFFFFFF, tl.int32)
        for part in tl.static_range(PARTS):
            column = part * PART + tl.arange(0, PART)
            bad = tl.minimum(bad, tl.where(scores[part] < float("inf"), 0x7FFFFFFF, column))
        tl.atomic_min(offender_ptr, row * cols + tl.min(bad))

    # reach(t) = number of scores >= t. The threshold lies between low and high, bits in units of 2^ZERO_BITS: reach(low) >
    # keep >= reach(high), until reach(high) == keep or only scores equal to low are between. A step goes where a straight
    # line between the excesses reach - keep at both ends crosses zero; an end that stays twice counts half (the Illinois
    # method), and every eighth step halves the interval. The first one guesses from the mean score: about 7 in all.
    low, high, reach_high = tl.full((), 0, tl.int32), (highest_bits >> ZERO_BITS) + 1, 0
    excess_low, excess_high = (cols - keep).to(tl.float32), -keep.to(tl.float32)
    guess = tl.sum(scores[0]) / tl.minimum(cols, PART) * 1.5 * excess_low / cols
    middle = guess.to(tl.int32, bitcast=True) >> ZERO_BITS
    step, side = 0, 0
    while (reach_high != keep) & (high - low > 1):
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        threshold = (middle << ZERO_BITS).to(tl.float32, bitcast=True)
        reached = tl.zeros((PART,), tl.float32)  # exact, and an instruction a score fewer than a sum of integers
        for part in tl.static_range(PARTS):
            reached += tl.where(scores[part] >= threshold, 1.0, 0.0)
        reach = tl.sum(tl.sum(reached.reshape(PART // 4, 4), axis=1).to(tl.int32))
        excess = (reach - keep).to(tl.float32)
        if reach > keep:
            excess_high *= tl.where(side == 1, 0.5, 1.0)
            low, excess_low, side = middle, excess, 1
        else:
            excess_low *= tl.where(side == 2, 0.5, 1.0)
            high, excess_high, side, reach_high = middle, excess, 2, reach
        low_score = (low << ZERO_BITS).to(tl.float32, bitcast=True)
        high_score = (high << ZERO_BITS).to(tl.float32, bitcast=True)
        crossing = low_score + (high_score - low_score) * (excess_low / (excess_low - excess_high))
        middle = crossing.to(tl.int32, bitcast=True) >> ZERO_BITS
        step += 1
        middle = tl.where((step & 7) == 7, low + (high - low) // 2, middle)

    place = (weight_row_ptr, output_ptr + row * stride_output_row, cols)
    threshold = (high << ZERO_BITS).to(tl.float32, bitcast=True)
    if reach_high == keep:
        _write_row(scores, threshold, weights, place, False, PRUNE, RELOAD, PARTS, PART)
    else:  # of the scores equal to low, those left of some column stay
        tied_score = (low << ZERO_BITS).to(tl.float32, bitcast=True)
        edge = _edge_of_ties(scores, tied_score, keep - reach_high, cols, PARTS, PART)
        raised = _raise_ties(scores, tied_score, edge, PARTS, PART)
        _write_row(raised, threshold, weights, place, True, PRUNE, RELOAD, PARTS, PART)


@triton.jit
def _edge_of_ties(scores, tied_score, wanted, cols, PARTS: tl.constexpr, PART: tl.constexpr):
    """The column that has `wanted` scores equal to tied_score on its left."""
    edge, right = 0, cols
    while edge < right:
        middle = (edge + right) // 2
        found = tl.zeros((PART,), tl.int32)
        for part in tl.static_range(PARTS):
            found += ((scores[part] == tied_score) & (tl.arange(0, PART) < middle - part * PART)).to(tl.int32)
        enough = tl.sum(found) >= wanted
        right, edge = tl.where(enough, middle, right), tl.where(enough, edge, middle + 1)
    return edge


@triton.jit
def _raise_ties(scores, tied_score, edge, PARTS: tl.constexpr, PART: tl.constexpr):
    """The scores, those equal to tied_score and left of column `edge` replaced by infinity."""
    raised = ()
    for part in tl.static_range(PARTS):
        chosen = (scores[part] == tied_score) & (tl.arange(0, PART) < edge - part * PART)
        raised = raised + (tl.where(chosen, float("inf"), scores[part]),)
    return raised


@triton.jit
def _write_row(
    scores,
    threshold,
    weights,
    place,  # pointers to the row of the weight and of the output, columns
    KEEPS_ZEROS: tl.constexpr,
    PRUNE: tl.constexpr,
    RELOAD: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Mask, or bitmask and pruned weights, of the scores that reach the threshold. A kept zero may be -0.0."""
    weight_row_ptr, output_row_ptr, cols = place
    for part in tl.static_range(PARTS):
        inside = part * PART + tl.arange(0, PART) < cols
        offs_cols = part * PART + tl.arange(0, PART).to(tl.int64)
        kept = scores[part] >= threshold
        if PRUNE:
            weight_tile = weights[part]
            if RELOAD:
                weight_tile = tl.load(weight_row_ptr + offs_cols, mask=inside, other=0.0)
            clean = kept & is_nonzero(weight_tile) if KEEPS_ZEROS else kept
            tl.store(weight_row_ptr + offs_cols, tl.where(clean, weight_tile, 0.0), mask=inside)
            store_bits(output_row_ptr, kept, part * PART, cols, PART)
        else:
            tl.store(output_row_ptr + offs_cols, kept.to(tl.int8), mask=inside)


@triton.jit
def _wide_key(
    weight_tile, column_scale_ptr, gradient_ptr, row, offs_cols, inside, alpha, cols, stride_gradient_row, offender_ptr
):
    """Score bits of a tile of a wide row: their bytes are the digits of the radix search."""
    offs_gradient = row * stride_gradient_row + offs_cols
    score = score_of(weight_tile, column_scale_ptr, gradient_ptr, offs_cols, offs_gradient, inside, alpha)
    if offender_ptr is not None:
        bad = first_nonfinite(score, tl.arange(0, offs_cols.shape[0]))
        if bad < offs_cols.shape[0]:
            tl.atomic_min(offender_ptr, row * cols + tl.min(offs_cols) + bad)
    return bits_of(score)


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
    kept = kept | (inside & (key > threshold))
    output_row_ptr = output_ptr + row * stride_output_row
    if PRUNE:
        tl.store(weight_ptrs, tl.where(kept & is_nonzero(weight_tile), weight_tile, 0.0), mask=inside)
        store_bits(output_row_ptr, kept, tile.to(tl.int64) * BLOCK_COLS, cols, BLOCK_COLS)
    else:
        tl.store(output_row_ptr + offs_cols, kept.to(tl.int8), mask=inside)
