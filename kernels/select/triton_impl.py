"""Fused score and choice in Triton: what is launched, and with which tiles.

n:m   triton_nm.py: scores, choice, zeroing, bitmask and packed values of a tile in registers
rows  triton_rows.py: a threshold search over a row that stays on chip; very wide rows by a radix search

Every kernel is launched with `enable_fp_fusion=False`: a fused multiply-add would change scores by one ulp.
"""

import torch
import triton
from torch import Tensor

from wandapp.errors import BackendUnavailableError
from wandapp.kernels.select.triton_nm import _select_nm_kernel
from wandapp.kernels.select.triton_rows import (
    _count_digits_kernel,
    _count_ties_kernel,
    _select_rows_kernel,
    _write_wide_rows_kernel,
)
from wandapp.kernels.triton_groups import WIDEST_GROUP, empty_bitmask, offender_cell, pack_mask

WIDEST_ROW = 32768  # 64 scores in each of 512 threads
WIDE_BLOCK, WIDE_STEPS = 2048, 8  # of the radix search: columns a step, steps of a counting program


def select_nm_triton(weight, column_scale, gradient, *, n, m, alpha) -> tuple[Tensor, Tensor]:
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    return mask, _launch_nm(weight, column_scale, gradient, mask, n, m, alpha, prune=False)


def prune_nm_triton(weight, column_scale, gradient, *, n, m, alpha) -> tuple[Tensor, Tensor]:
    return _prune_nm(weight, column_scale, gradient, None, n, m, alpha)


def prune_pack_nm_triton(weight, column_scale, gradient, *, n, m, alpha) -> tuple[Tensor, Tensor, Tensor]:
    values = weight.new_empty(weight.shape[0], weight.shape[1] // m * n)
    return values, *_prune_nm(weight, column_scale, gradient, values, n, m, alpha)


def select_rows_triton(weight, column_scale, gradient, *, keep, alpha) -> tuple[Tensor, Tensor]:
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    return mask, _launch_rows(weight, column_scale, gradient, mask, keep, alpha, prune=False)


def prune_rows_triton(weight, column_scale, gradient, *, keep, alpha) -> tuple[Tensor, Tensor]:
    bitmask = empty_bitmask(weight)
    return bitmask, _launch_rows(weight, column_scale, gradient, bitmask, keep, alpha, prune=True)


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
    """Parts of one program's row buffer, and its warps: 8 scores a thread and part, up to 8 parts.

    The more scores a thread has, the less of its time goes to the sum over threads. Parts waste less than one power of two
    would: 11008 columns take 6 parts of 2048. Rows of many parts are read again, from L2, to be written: 128
    registers a thread then hold the scores, and 16 warps or more share an SM.
    """
    part = max(256, triton.next_power_of_2(cols) // 8)
    parts = triton.cdiv(cols, part)
    registers = {"maxnreg": 128} if parts > 4 else {}
    return {"PARTS": parts, "PART": part, "RELOAD": parts > 4, "num_warps": part // 256, **registers}


def _prune_nm(weight, column_scale, gradient, values, n, m, alpha) -> tuple[Tensor, Tensor]:
    if m in (2, 4, 8, 16):  # bits of whole groups fill bytes
        bitmask = empty_bitmask(weight)
        return bitmask, _launch_nm(weight, column_scale, gradient, bitmask, n, m, alpha, prune=True, values=values)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    offender = _launch_nm(weight, column_scale, gradient, mask, n, m, alpha, prune=True, values=values)
    return pack_mask(mask), offender


def _launch_nm(weight, column_scale, gradient, output, n, m, alpha, *, prune, values=None) -> Tensor:
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
            weight, column_scale, gradient, output, values, offender, float(alpha), rows, cols, blocks,
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
        zero_bits = _zero_bits(weight, column_scale, gradient)
        if cols > WIDEST_ROW:
            _launch_wide_rows(terms, strides, prune)
        else:
            _select_rows_kernel[(rows,)](
                *terms, *strides, ZERO_BITS=zero_bits, PRUNE=prune, **row_tile(cols, weight.element_size()),
                enable_fp_fusion=False,
            )  # fmt: skip
    return offender.view(torch.int64)


def _launch_wide_rows(terms, strides, prune) -> None:
    """Radix search, highest byte of the scores first: each pass counts the scores that agree with the bytes found so far."""
    weight, column_scale, gradient, output, offender, alpha, cols, keep = terms
    rows, device = weight.shape[0], weight.device
    found = torch.zeros(rows, dtype=torch.int32, device=device)  # the bytes found so far, as one integer
    wanted = torch.full((rows,), keep, dtype=torch.int64, device=device)  # still to keep among scores that agree
    block, steps = WIDE_BLOCK, WIDE_STEPS
    options = {"BLOCK_COLS": block, "num_warps": 4, "enable_fp_fusion": False}
    source = (weight, column_scale, gradient)
    for digit_shift in (24, 16, 8, 0):
        counts = torch.zeros(rows, 256, dtype=torch.int32, device=device)
        _count_digits_kernel[(triton.cdiv(cols, block * steps), rows)](
            *source, counts, found, offender, alpha, cols, *strides[:2], DIGIT_SHIFT=digit_shift, STEPS=steps, **options
        )
        larger = counts.flip(1).cumsum(1).flip(1) - counts  # scores with a larger digit than the one in this column
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


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _zero_bits(weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None) -> int:
    """Low bits of a score that are 0 because the score is the weight's own magnitude: fewer steps of the search."""
    if column_scale is not None or gradient is not None:
        return 0
    return {torch.bfloat16: 16, torch.float16: 13}.get(weight.dtype, 0)
