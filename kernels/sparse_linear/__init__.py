"""y = x W^T + b on a packed W. Decode is bound by the bytes of W, and the packed form moves about half of them."""

import torch
from torch import Tensor

from wandapp.kernels import dispatch
from wandapp.kernels.checks import WEIGHT_DTYPES, require
from wandapp.kernels.pack import Packed, check_packed
from wandapp.kernels.sparse_linear import cuda


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x W^T + bias for a packed W, products summed in fp32.

    int8 values: y_r = scale_r * sum_c q_rc x_c + bias_r
    on CPUs, from 256 tokens on in fp32 arithmetic: columns that a row does not keep are skipped, NaN and Inf of x too
    bf16 on processors with AVX512-BF16: denormal weights and inputs (below 1.2e-38) count as zero, as in torch's product

    x        [..., in_features] in the dtype of packed.values; fp32, bf16 or fp16 where those are int8
    bias     [out_features] in the dtype of x
    returns  [..., out_features] in the same dtype
    raises   WandappError on a shape, dtype or device error
    """
    check_call(x, packed, bias)
    bias = None if bias is None else bias.contiguous()
    n, m = packed.pattern or (None, None)
    out_features, in_features = packed.shape
    leading = x.shape[:-1]
    tokens = x.reshape(leading.numel(), in_features).contiguous()
    parts = (packed.values, packed.bitmask, packed.row_offsets, packed.scale)
    y = _sparse_linear(tokens, *parts, bias, out_features, in_features, n, m, backend)
    return y.view(*leading, out_features)


def check_call(x: Tensor, packed: Packed, bias: Tensor | None) -> None:
    """Raises WandappError unless x, packed and bias fit each other."""
    check_packed(packed)
    out_features, in_features = packed.shape
    values = packed.values
    fits = x.dtype == values.dtype if packed.scale is None else x.dtype in WEIGHT_DTYPES
    require(
        x.dim() >= 1 and x.shape[-1] == in_features and fits and x.device == values.device,
        f"x must be {values.dtype if packed.scale is None else 'floating-point'} [..., {in_features}] on "
        f"{values.device}, got {x.dtype} {list(x.shape)} on {x.device}",
    )
    if bias is not None:
        require(
            tuple(bias.shape) == (out_features,) and bias.dtype == x.dtype and bias.device == values.device,
            f"bias must be {x.dtype} [{out_features}] on {values.device}, got {bias.dtype} {list(bias.shape)}",
        )


@torch.library.custom_op("wandapp::sparse_linear", mutates_args=())
def _sparse_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    cols: int,
    n: int | None,
    m: int | None,
    backend: str | None,
) -> Tensor:
    """Launchers `sparse_linear_<backend>(x, packed, bias)` get contiguous x [tokens, cols] -> [tokens, rows]."""
    packed = Packed(values, bitmask, row_offsets, (rows, cols), None if n is None else (n, m), scale)
    preferred = cuda.preference(len(x), packed) if x.is_cuda else None
    return dispatch.launcher("sparse_linear", x.device, backend, preferred=preferred)(x, packed, bias)


@_sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    *_: object,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)
