"""Sum over tokens of x^2 for every feature: what the norm of an input column is made of."""

import torch
from torch import Tensor

from wandapp.kernels import dispatch
from wandapp.kernels.checks import WEIGHT_DTYPES, require, unit_column_stride


def column_sumsq(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Sum over tokens of x^2, for each feature and each leading index.

    x        [..., tokens, features] fp16, bf16 or fp32
    returns  [..., features] fp32; squares and sums are formed in fp32
    raises   WandappError on a shape or dtype error
    """
    require(x.dim() >= 2, f"x must be [..., tokens, features], got shape {list(x.shape)}")
    require(x.dtype in WEIGHT_DTYPES, f"x must be float32, bfloat16 or float16, got {x.dtype}; convert it first")
    leading, (tokens, features) = x.shape[:-2], x.shape[-2:]
    batches = unit_column_stride(x).reshape(leading.numel(), tokens, features)
    return _column_sumsq(batches, backend).view(*leading, features)


@torch.library.custom_op("wandapp::column_sumsq", mutates_args=())
def _column_sumsq(x: Tensor, backend: str | None) -> Tensor:
    """Launchers `column_sumsq_<backend>(x)` get x [batch, tokens, features], unit last stride -> [batch, features]."""
    return dispatch.launcher("column_sumsq", x.device, backend)(x)


@_column_sumsq.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
