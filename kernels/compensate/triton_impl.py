"""SparseGPT's column loop in Triton: a tile of rows stays in registers from the block's first column to its last."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wandapp.errors import BackendUnavailableError
from wandapp.kernels.triton_groups import offender_cell

WIDEST_BLOCK = 128
BLOCK_ROWS = 8  # a row lies in one warp, so a column is spread without a barrier


def compensate_block_triton(
    weight: Tensor, factor: Tensor, *, n: int | None, m: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = weight.shape
    if width > WIDEST_BLOCK:
        raise BackendUnavailableError(
            f"the triton backend compensates blocks of up to {WIDEST_BLOCK} columns, got {width}; use --block-size 128"
        )
    used = torch.empty(rows, width, dtype=torch.bool, device=weight.device)
    error = torch.empty(rows, width, dtype=torch.float32, device=weight.device)
    offender = offender_cell(weight.device)
    if weight.numel():
        _compensate_block_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
            weight, factor, None if mask is None else mask.view(torch.uint8), used.view(torch.uint8), error, offender,
            rows, width, weight.stride(0), N=n, M=m, BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLS=max(16, triton.next_power_of_2(width)), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return used, error, offender.view(torch.int64)


@triton.jit
def _column(tile, offs_cols, c):
    """Column c of tile [rows, columns]: the sum of one number and zeros is that number."""
    return tl.sum(tl.where(offs_cols[None, :] == c, tile, 0.0), axis=1)[:, None]


@triton.jit
def _compensate_block_kernel(
    weight_ptr,
    factor_ptr,
    mask_ptr,
    used_ptr,
    error_ptr,
    offender_ptr,
    rows,
    width,
    stride_weight_row,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    offs_rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    offs_cols = tl.arange(0, BLOCK_COLS)
    keep_cols = offs_cols < width
    inside = (offs_rows < rows) & keep_cols[None, :]
    weight_ptrs = weight_ptr + offs_rows * stride_weight_row + offs_cols[None, :]
    offs_flat = offs_rows * width + offs_cols[None, :]
    weight_tile = tl.load(weight_ptrs, mask=inside, other=0.0)
    error_tile = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    diagonal = tl.load(factor_ptr + offs_cols * (width + 1), mask=keep_cols, other=1.0)[None, :]
    if mask_ptr is None:
        used = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.int32)
    else:
        used = tl.load(mask_ptr + offs_flat, mask=inside, other=1).to(tl.int32)

    for c in range(width):
        if mask_ptr is None:
            if c % M == 0:
                score = tl.div_rn(weight_tile * weight_tile, diagonal * diagonal)
                rank = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.int32)  # how many of columns c..c+M-1 are preferred
                for other in range(c, c + M):
                    rival = _column(score, offs_cols, other)
                    rank += ((rival > score) | ((rival == score) & (other < offs_cols)[None, :])).to(tl.int32)
                in_group = ((offs_cols >= c) & (offs_cols < c + M))[None, :]
                used = tl.where(in_group, (rank < N).to(tl.int32), used)
        factor_row = tl.load(factor_ptr + c * width + offs_cols, mask=(offs_cols > c) & keep_cols, other=0.0)[None, :]
        pivot = tl.load(factor_ptr + c * (width + 1))
        at_c = (offs_cols == c)[None, :]
        pruned = weight_tile - tl.where(used != 0, weight_tile, 0.0)  # NaN - NaN stays NaN: a kept one is reported too
        error = tl.div_rn(_column(pruned, offs_cols, c), tl.zeros((BLOCK_ROWS, 1), tl.float32) + pivot)
        error_tile = tl.where(at_c, error, error_tile)
        spread = weight_tile - error * factor_row  # up to c the factor is 0
        weight_tile = tl.where(at_c & (used == 0), 0.0, spread)

    tl.store(weight_ptrs, weight_tile, mask=inside)
    tl.store(error_ptr + offs_flat, error_tile, mask=inside)
    tl.store(used_ptr + offs_flat, used.to(tl.int8), mask=inside)
    bad = inside & ~(tl.abs(error_tile) < float("inf"))
    if tl.max(bad.to(tl.int32)) != 0:
        offs_local = tl.arange(0, BLOCK_ROWS)[:, None] * width + offs_cols[None, :]
        first = tl.min(tl.where(bad, offs_local, 0x7FFFFFFF))
        tl.atomic_min(offender_ptr, (tl.program_id(0) * BLOCK_ROWS).to(tl.int64) * width + first)
