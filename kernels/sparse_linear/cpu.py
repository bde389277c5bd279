"""sparse_linear on the CPU: packed kernels for few tokens, dense products of unpacked row panels for many."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from wandapp import _C
from wandapp.kernels.native import address, instruction_set
from wandapp.kernels.pack import Packed
from wandapp.kernels.pack.cpu import packed_weight, unpack_rows

MAX_PACKED_TOKENS = 16  # beyond, arithmetic and not the bytes of W is the bound, and dense products are better at it
PANEL_WEIGHTS = 4 << 20  # weights unpacked at a time: they stay in cache until the product has read them


def sparse_linear_cpu(x: Tensor, packed: Packed, bias: Tensor | None, *, isa: str | None = None) -> Tensor:
    tokens, rows = x.shape[0], packed.shape[0]
    y = x.new_empty(tokens, rows)
    if tokens <= MAX_PACKED_TOKENS:
        run = (torch.get_num_threads(), instruction_set(isa))
        _C.sparse_linear(packed_weight(packed), address(x), tokens, address(bias), address(y), *run)
        return y
    panel_rows = min(max(PANEL_WEIGHTS // max(packed.shape[1], 1), 1), rows)
    panel = x.new_empty(panel_rows, packed.shape[1])  # one for all: fresh memory would cost a page fault per 4 KiB
    for begin in range(0, rows, panel_rows):
        end = min(begin + panel_rows, rows)
        panel_bias = None if bias is None else bias[begin:end]
        dense_rows = unpack_rows(packed, begin, end, panel[: end - begin], isa=isa)
        y[:, begin:end] = linear(x, dense_rows, panel_bias)
    return y
