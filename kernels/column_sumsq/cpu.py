"""column_sumsq in C++."""

import torch
from torch import Tensor

from wandapp import _C
from wandapp.kernels.native import DTYPE_CODES, address, instruction_set


def column_sumsq_cpu(x: Tensor, *, isa: str | None = None) -> Tensor:
    """[batch, features] fp32 from x [batch, tokens, features]; the result does not depend on the thread count."""
    batches, tokens, features = x.shape
    out = torch.empty(batches, features, dtype=torch.float32)
    layout = (DTYPE_CODES[x.dtype], batches, tokens, features, x.stride(0), x.stride(1))
    _C.column_sumsq(address(x), *layout, address(out), torch.get_num_threads(), instruction_set(isa))
    return out
