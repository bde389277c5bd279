"""The n:m kernel: a tile of rows x columns is read once; the m scores of a group lie in one thread's registers, a sorting
network finds the n-th largest, and a running count gives equal scores to the lower columns."""

import triton
import triton.language as tl

from wandapp.kernels.triton_groups import (
    columns_of_part,
    gather_kept,
    is_nonzero,
    keep_bits,
    split_lanes,
    spread_bits,
    store_group_bits,
    store_kept,
    widen,
)


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
def _select_nm_kernel(
    weight_ptr,
    column_scale_ptr,
    gradient_ptr,
    output_ptr,  # BITS: the bitmask in words of max(8, M) bits; else bool [rows, cols]
    values_ptr,  # PRUNE: the kept weights [rows, groups * N], or None
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
    offs_rows = (block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    keep_rows = offs_rows < rows

    # Each part is one tile [BLOCK_ROWS, BLOCK_GROUPS * PART]: PART neighbouring columns of every group.
    weights, lanes, columns = (), (), ()
    bad = 0x7FFFFFFF  # least row of the tile * cols + column whose score is NaN or Inf
    for part in tl.static_range(M_PADDED // PART):
        offs_cols, exist = columns_of_part(first_group, part, cols, M, PART, BLOCK_GROUPS)
        inside = keep_rows & exist
        weight_tile = tl.load(weight_ptr + offs_rows * stride_weight_row + offs_cols, mask=inside, other=0.0)
        offs_gradient = offs_rows * stride_gradient_row + offs_cols
        score = score_of(weight_tile, column_scale_ptr, gradient_ptr, offs_cols, offs_gradient, inside, alpha)
        bad = tl.minimum(bad, first_nonfinite(score, tl.arange(0, BLOCK_ROWS)[:, None] * cols + offs_cols))
        if M != M_PADDED:
            score = tl.where(exist, score, float("-inf"))
        weights, columns = weights + (weight_tile,), columns + ((offs_cols, inside),)
        lanes = lanes + split_lanes(score, PART)
    if bad != 0x7FFFFFFF:
        tl.atomic_min(offender_ptr, (block_row * BLOCK_ROWS).to(tl.int64) * cols + bad)

    bits = keep_bits(lanes, N, M_PADDED)  # [BLOCK_ROWS, BLOCK_GROUPS]
    kept_lanes = ()
    for part in tl.static_range(M_PADDED // PART):
        offs_cols, inside = columns[part]
        keep = spread_bits(bits >> (part * PART), PART)
        if PRUNE:
            kept = tl.where(keep & is_nonzero(weights[part]), weights[part], 0.0)
            tl.store(weight_ptr + offs_rows * stride_weight_row + offs_cols, kept, mask=inside)
            if values_ptr is not None:
                kept_lanes = kept_lanes + split_lanes(kept, PART)
        if not BITS:
            tl.store(output_ptr + offs_rows * cols + offs_cols, keep.to(tl.int8), mask=inside)
    if BITS:
        store_group_bits(output_ptr, bits, first_group, cols, offs_rows, keep_rows, M)
    if values_ptr is not None:
        packed = gather_kept(kept_lanes, bits, N, M)
        store_kept(values_ptr, packed, first_group, cols // M, offs_rows, keep_rows, N)
