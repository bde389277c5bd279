"""y = x W^T + b from the packed form in Triton, for the few tokens of decode; more tokens go through the dense weight.

2:4 in 16 bits: a warp owns 16 or 32 rows of one quarter of the columns in work. It expands values and bitmask in
registers (three selects a group, no address is computed per weight) and hands the dense fragment to the tensor cores,
whose cost is the same for 1 and for 16 tokens. The quarters meet once, at the end: bytes of W decide the time.

Every other pattern, and fp32: each thread finds the place of its 8 columns' weights by a running count of the bitmask
and loads them one by one; neighbours in the row are neighbours in memory. About 17 thread-instructions a byte: twice
what keeps the memory busy, so this path gains less than the bytes it saves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from wandapp.kernels.pack import Packed, require_no_scale
from wandapp.kernels.pack.triton_impl import unpack_triton
from wandapp.kernels.triton_groups import split_lanes, widen

DECODE_TOKENS = 16  # two fragments of the tensor cores; one, of 8 tokens, is the narrowest
QUARTERS = 4  # warps of a program, each with its own columns
ENOUGH_PROGRAMS = 256  # below it, columns are split over programs too


def sparse_linear_triton(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    require_no_scale(packed, "triton")
    if x.shape[0] > DECODE_TOKENS:
        return linear(x, unpack_triton(packed, x.dtype), bias)
    y = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if packed.pattern == (2, 4) and x.element_size() == 2:
        return _decode_24(x, packed, bias, y)
    return _decode_gather(x, packed, bias, y)


def decode_24_config(tokens: int, rows: int, cols: int) -> dict:
    """Tile of one program: rows, columns of one warp per step, software pipeline, and programs that share a row.

    With more than 8 tokens and 16 rows the compiler would make do with 80 registers, and spill, where shared memory leaves
    room for three programs on an SM whatever they take: so it is told of 128.
    """
    block_rows = 16 if tokens <= 4 or rows < 8192 else 32
    block_cols = min(128, max(32, triton.next_power_of_2(cols) // QUARTERS))
    programs = triton.cdiv(rows, block_rows)
    splits = max(1, min(ENOUGH_PROGRAMS // programs, triton.cdiv(cols, QUARTERS * block_cols) // 2))
    registers = {"maxnreg": 128} if tokens > 8 and block_rows == 16 else {}
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "SPLITS": splits, "num_stages": 3, **registers}


def _decode_24(x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, config: dict | None = None) -> Tensor:
    rows, cols = packed.shape
    config = config or decode_24_config(x.shape[0], rows, cols)
    splits = config["SPLITS"]
    words = cols % 32 == 0  # then rows of the bitmask are whole 32-bit words
    bitmask = packed.bitmask.contiguous()
    partial = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=y.device)
    _decode_24_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]), splits)](
        x, packed.values.contiguous(), bitmask.view(torch.int32) if words else bitmask,
        bias if splits == 1 else None, partial, x.shape[0], rows, cols, cols // 2, cols // 32 if words else cols + 7 >> 3,
        WORD_COLS=32 if words else 8, TOKENS=8 if x.shape[0] <= 8 else 16, QUARTERS=QUARTERS,
        WIDEN=x.device.type == "cpu", **config, num_warps=QUARTERS, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _add_splits_kernel[(triton.cdiv(y.numel(), 512),)](
            partial, bias, y, y.numel(), rows, SPLITS=splits, BLOCK=512, num_warps=4
        )
    return y


def _decode_gather(x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor) -> Tensor:
    rows, cols = packed.shape
    tokens = x.shape[0]
    block_tokens = min(8, triton.next_power_of_2(tokens))
    values_per_row = 0 if packed.pattern is None else packed.values.shape[1]
    _decode_gather_kernel[(triton.cdiv(rows, 8), triton.cdiv(tokens, block_tokens))](
        x, packed.values.contiguous(), packed.bitmask.contiguous(), packed.row_offsets, bias, y,
        tokens, rows, cols, values_per_row, BLOCK_ROWS=8, BLOCK_COLS=256, BLOCK_TOKENS=block_tokens, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y


@triton.jit
def _decode_24_kernel(
    x_ptr,
    values_ptr,
    bitmask_ptr,  # words of WORD_COLS bits
    bias_ptr,
    y_ptr,  # [tokens, rows], or fp32 [SPLITS, tokens, rows]
    tokens,
    rows,
    cols,
    stride_values_row,
    stride_bitmask_row,
    WORD_COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    QUARTERS: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter would multiply bf16 as integers
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK_COLS // 4
    WORDS: tl.constexpr = BLOCK_COLS // WORD_COLS
    offs_rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[None, :, None]
    quarter = tl.arange(0, QUARTERS)[:, None, None]
    offs_tokens = tl.arange(0, TOKENS)[None, None, :]
    offs_k = tl.arange(0, BLOCK_COLS)[None, :, None]
    values_row_ptrs = values_ptr + offs_rows * stride_values_row
    bitmask_row_ptrs = bitmask_ptr + offs_rows * stride_bitmask_row
    keep_rows = offs_rows < rows

    steps = tl.cdiv(cols, QUARTERS * BLOCK_COLS)
    steps_per_split = tl.cdiv(steps, SPLITS)
    first_step = tl.program_id(1) * steps_per_split
    y_tile = tl.zeros((QUARTERS, BLOCK_ROWS, TOKENS), tl.float32)
    for step in range(first_step, tl.minimum(first_step + steps_per_split, steps)):
        block = step * QUARTERS + quarter
        offs_values = block * (BLOCK_COLS // 2) + tl.arange(0, BLOCK_COLS // 2)[None, None, :]
        keep_values = keep_rows & (offs_values < cols // 2)
        value_tile = tl.load(values_row_ptrs + offs_values, mask=keep_values, other=0.0)
        offs_words = block * WORDS + tl.arange(0, WORDS)[None, None, :]
        keep_words = keep_rows & (offs_words < stride_bitmask_row)
        words = tl.load(bitmask_row_ptrs + offs_words, mask=keep_words, other=0).to(tl.int32)
        offs_cols = block * BLOCK_COLS + offs_k
        keep_x = (offs_cols < cols) & (offs_tokens < tokens)
        x_tile = tl.load(
            x_ptr + offs_tokens * cols + offs_cols, mask=keep_x, other=0.0
        )  # [QUARTERS, BLOCK_COLS, TOKENS]

        nibble_shift = tl.arange(0, WORD_COLS // 4)[None, None, None, :] * 4
        nibbles = (words[:, :, :, None] >> nibble_shift).reshape(QUARTERS, BLOCK_ROWS, GROUPS)
        weight_tile = _expand_24(value_tile, nibbles, QUARTERS, BLOCK_ROWS, GROUPS)
        if WIDEN:
            weight_tile, x_tile = weight_tile.to(tl.float32), x_tile.to(tl.float32)
        y_tile = tl.dot(weight_tile, x_tile, acc=y_tile)

    y = tl.sum(y_tile, axis=0)  # [BLOCK_ROWS, TOKENS]
    offs_rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    offs_tokens = tl.arange(0, TOKENS)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_rows, mask=offs_rows < rows, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + (tl.program_id(1) * tokens + offs_tokens) * rows + offs_rows
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_rows < rows) & (offs_tokens < tokens))


@triton.jit
def _expand_24(value_tile, nibbles, QUARTERS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Dense [QUARTERS, ROWS, 4 * GROUPS] from two values a group and the four low bits of `nibbles`, two of them set.

    Column 0 can only hold the first value and column 3 only the second; in between, the neighbour's bit decides which.
    """
    first, second = tl.split(value_tile.reshape(QUARTERS, ROWS, GROUPS, 2))
    in0, in1, in2, in3 = (nibbles & 1) != 0, (nibbles & 2) != 0, (nibbles & 4) != 0, (nibbles & 8) != 0
    column0 = tl.where(in0, first, 0.0)
    column1 = tl.where(in1, tl.where(in0, second, first), 0.0)
    column2 = tl.where(in2, tl.where(in3, first, second), 0.0)
    column3 = tl.where(in3, second, 0.0)
    dense = tl.join(tl.join(column0, column2), tl.join(column1, column3))
    return dense.reshape(QUARTERS, ROWS, GROUPS * 4)


@triton.jit
def _add_splits_kernel(partial_ptr, bias_ptr, y_ptr, size, rows, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    y = tl.load(partial_ptr + offs, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(partial_ptr + split * size + offs, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decode_gather_kernel(
    x_ptr,
    values_ptr,
    bitmask_ptr,
    row_offsets_ptr,  # None: every row has values_per_row values
    bias_ptr,
    y_ptr,
    tokens,
    rows,
    cols,
    values_per_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    offs_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    keep_rows = offs_rows < rows
    if row_offsets_ptr is None:
        row_start = offs_rows.to(tl.int64) * values_per_row
    else:
        row_start = tl.load(row_offsets_ptr + offs_rows, mask=keep_rows, other=0)
    offs_tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    keep_tokens = offs_tokens < tokens
    bitmask_row_ptrs = bitmask_ptr + (offs_rows.to(tl.int64) * tl.cdiv(cols, 8))[:, None]
    x_row_ptrs = x_ptr + (offs_tokens * cols)[:, None]

    BYTES: tl.constexpr = BLOCK_COLS // 8
    y_tile = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS, BYTES), tl.float32)
    before = tl.zeros((BLOCK_ROWS,), tl.int32)  # values of the row that lie left of the tile
    for first_col in range(0, cols, BLOCK_COLS):
        offs_bytes = first_col // 8 + tl.arange(0, BYTES)[None, :]
        keep_bytes = keep_rows[:, None] & (offs_bytes < tl.cdiv(cols, 8))
        byte = tl.load(bitmask_row_ptrs + offs_bytes, mask=keep_bytes, other=0).to(tl.int32)
        count = byte & 1
        for i in tl.static_range(1, 8):
            count += (byte >> i) & 1
        reach = before[:, None] + tl.cumsum(count, 1)
        before = tl.max(reach, 1)

        offs_cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
        keep_x = keep_tokens[:, None] & (offs_cols < cols)
        x_lanes = split_lanes(tl.load(x_row_ptrs + offs_cols, mask=keep_x, other=0.0), 8)  # 8 of [tokens, BYTES]
        place = row_start[:, None] + (reach - count)  # of the byte's first value
        for i in tl.static_range(8):
            bit = (byte >> i) & 1
            weight_tile = widen(tl.load(values_ptr + place, mask=bit != 0, other=0.0))
            y_tile += weight_tile[:, None, :] * widen(x_lanes[i])[None, :, :]
            place += bit

    y = tl.sum(y_tile, axis=2)  # [BLOCK_ROWS, BLOCK_TOKENS]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_rows, mask=keep_rows, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + offs_tokens[None, :] * rows + offs_rows[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=keep_rows[:, None] & keep_tokens[None, :])
