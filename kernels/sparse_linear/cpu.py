"""sparse_linear on the CPU: packed kernels for few tokens, dense products of unpacked row panels for many."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from wandapp import _C
from wandapp.kernels.native import DTYPE_CODES, address, instruction_set
from wandapp.kernels.pack import Packed
from wandapp.kernels.pack.cpu import packed_weight, unpack_rows

MAX_PACKED_TOKENS = 16  # beyond, arithmetic and not the bytes of W is the bound, and dense products are better at it
PANEL_WEIGHTS = 4 << 20  # weights unpacked at a time: they stay in cache until the product has read them


def sparse_linear_cpu(x: Tensor, packed: Packed, bias: Tensor | None, *, isa: str | None = None) -> Tensor:
    tokens, rows = x.shape[0], packed.shape[0]
    y = x.new_empty(tokens, rows)
    if tokens <= MAX_PACKED_TOKENS:
        run = (torch.get_num_threads(), instruction_set(isa))
        product = (DTYPE_CODES[x.dtype], address(x), tokens, address(bias), address(y))
        _C.sparse_linear(packed_weight(packed), *product, *run)
        return y
    panel_rows = max(min(PANEL_WEIGHTS // max(packed.shape[1], 1), rows), 1)
    panel = x.new_empty(panel_rows, packed.shape[1])  # one for all: fresh memory would cost a page fault per 4 KiB
    for begin in range(0, rows, panel_rows):
        end = min(begin + panel_rows, rows)
        panel_bias = None if bias is None else bias[begin:end]
        dense_rows = unpack_rows(packed, begin, end, panel[: end - begin], isa=isa)
        y[:, begin:end] = linear(x, dense_rows, panel_bias)
    return y


def prepare_cpu(packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """sparse_linear_cpu of one weight that stays where it is in memory, for contiguous x [..., cols] of `dtype`.

    Looking things up once takes a call from 8 to 3 us: a small model's token is made of hundreds of calls.
    """
    rows, cols = packed.shape
    weight, code, bias_address, isa = packed_weight(packed), DTYPE_CODES[dtype], address(bias), instruction_set(None)

    def run(x: Tensor) -> Tensor:
        tokens = x.numel() // cols
        if tokens > MAX_PACKED_TOKENS:
            return sparse_linear_cpu(x.view(tokens, cols), packed, bias).view(*x.shape[:-1], rows)
        y = x.new_empty(*x.shape[:-1], rows)
        addresses = (x.data_ptr(), tokens, bias_address, y.data_ptr())
        _C.sparse_linear(weight, code, *addresses, torch.get_num_threads(), isa)
        return y

    return run


def dense_linear_of_token_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias for one token x [..., cols] and a dense contiguous W; cols divisible by 64.

    In 16-bit types two to five times as fast as torch 2.13's product on a CPU without AMX (vocabulary 49152 x 576).
    """
    rows, cols = weight.shape
    y = x.new_empty(*x.shape[:-1], rows)
    args = (address(weight), DTYPE_CODES[weight.dtype], rows, cols, address(x), address(bias), address(y))
    _C.dense_linear(*args, torch.get_num_threads(), instruction_set(None))
    return y
