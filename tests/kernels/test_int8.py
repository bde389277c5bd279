"""int8 storage: scale_r = max_c |W_rc| / 127, q = round(W / scale) with ties to even, and products with any x."""

import pytest
import torch

from wandapp.errors import BackendUnavailableError, WandappError
from wandapp.kernels.pack import join_rows, pack, unpack
from wandapp.kernels.pack.cpu import unpack_rows
from wandapp.kernels.pack.int8 import relative_error, to_int8
from wandapp.kernels.select import prune_nm_
from wandapp.kernels.sparse_linear import sparse_linear

PATTERNS = {"unstructured": (None, None), "2:4": (2, 4), "1:2": (1, 2), "3:5": (3, 5)}
# One rounding of the output and fp32 sums; above 16 tokens the weights are rounded to x's type, too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2**-8, torch.float16: 2**-11 + 2**-11}


def pruned(rows, cols, n, m, dtype=torch.float32):
    weight = torch.randn(rows, cols).to(dtype)
    if n is None:
        return weight * (torch.rand(rows, cols) < 0.5)
    prune_nm_(weight, n=n, m=m)
    return weight


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_weight_is_the_nearest_multiple_of_its_row_s_scale(pattern, dtype, backend):
    n, m = PATTERNS[pattern]
    weight = pruned(33, 120, n, m, dtype)
    weight[5] = 0
    rounded = to_int8(pack(weight, n=n, m=m))
    assert rounded.values.dtype == torch.int8 and rounded.scale.dtype == torch.float32
    scale = weight.abs().amax(1).float() / 127
    assert torch.equal(rounded.scale, scale)
    steps = unpack(rounded._replace(scale=torch.ones(33)), backend=backend)
    half_a_step = (0.5 + 127 * 2**-23) * scale.double()[:, None]  # quotients and scales are rounded to fp32
    assert (weight.double() - scale.double()[:, None] * steps).abs().le(half_a_step).all()
    expected = (scale[:, None] * steps).to(dtype)
    found = unpack(rounded, dtype=dtype, backend=backend)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert not (found == 0).logical_and(found.signbit()).any()


def test_ties_go_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.5, 126.5, 0, 0]])
    assert to_int8(pack(weight)).values.tolist() == [127, 0, 2, -2, 0, 126]


def test_bytes_at_24_are_five_eighths_of_the_weights():
    packed = to_int8(pack(pruned(64, 256, 2, 4), n=2, m=4))
    assert packed.nbytes == 0.625 * 64 * 256 + 64 * 4


def test_denormal_rows_are_exact_and_zero_rows_stay_zero():
    weight = torch.zeros(3, 32)
    weight[1, ::2] = 2.0**-149 * torch.arange(16)
    rounded = to_int8(pack(weight))
    assert torch.equal(unpack(rounded), weight) and rounded.scale.tolist() == [0.0, 2.0**-149, 0.0]


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 8, 16, 17, 260])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_product_is_that_of_the_rounded_weight(pattern, tokens, dtype, backend):
    n, m = PATTERNS[pattern]
    for cols in (96, 120) if m != 5 else (120,):
        rounded = to_int8(pack(pruned(50, cols, n, m), n=n, m=m))
        weight = rounded.scale.double()[:, None] * unpack(rounded._replace(scale=torch.ones(50))).double()
        x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(50).to(dtype)
        y = sparse_linear(x, rounded, bias, backend=backend)
        error = (y.double() - (x.double() @ weight.T + bias.double())).abs()
        size = x.double().abs() @ weight.abs().T + bias.double().abs()
        assert y.dtype == dtype and (error <= TOLERANCE[dtype] * size + 1e-7).all()


def test_what_cannot_be_rounded_or_joined_is_refused():
    packed = pack(pruned(4, 32, 2, 4), n=2, m=4)
    rounded = to_int8(packed)
    with pytest.raises(WandappError, match="float32, bfloat16 or float16, got torch.int8"):
        to_int8(rounded)
    for bad in (float("nan"), float("inf")):
        values = packed.values.clone()
        values[2, 3] = bad
        with pytest.raises(WandappError, match="no NaN and no Inf"):
            to_int8(packed._replace(values=values))
    with pytest.raises(WandappError, match=r"scale must be float32 \[4\]"):
        unpack(rounded._replace(scale=rounded.scale[:3].clone()))
    with pytest.raises(WandappError, match="values with a scale must be int8"):
        unpack(packed._replace(scale=rounded.scale))
    with pytest.raises(WandappError, match="values must be float32"):
        unpack(rounded._replace(scale=None))
    with pytest.raises(WandappError, match="of one dtype"):
        join_rows([packed, rounded])
    with pytest.raises(WandappError, match="unpack to that"):
        unpack(packed, dtype=torch.float16)


def test_joined_rows_keep_their_scales():
    for n, m in ((2, 4), (None, None)):
        parts = [to_int8(pack(pruned(rows, 32, n, m), n=n, m=m)) for rows in (3, 5)]
        assert torch.equal(unpack(join_rows(parts)), torch.cat([unpack(part) for part in parts]))


def test_relative_error_is_that_of_the_norms():
    packed = pack(pruned(8, 64, 2, 4), n=2, m=4)
    rounded = to_int8(packed)
    exact = unpack(packed).double()
    assert relative_error(packed, rounded) == pytest.approx(
        float((exact - unpack(rounded)).norm() / exact.norm()), rel=1e-5
    )
    zero = pack(torch.zeros(2, 4))
    assert relative_error(zero, to_int8(zero)) == 0


def test_backends_without_int8_say_so():
    rounded = to_int8(pack(pruned(4, 32, 2, 4), n=2, m=4))
    from wandapp.kernels.pack import require_no_scale

    with pytest.raises(BackendUnavailableError, match="no kernel for int8"):
        require_no_scale(rounded, "triton")


def test_some_rows_unpack_with_their_own_scales():
    packed = to_int8(pack(torch.randn(11, 64) * torch.arange(1.0, 12)[:, None]))
    assert torch.equal(unpack_rows(packed, 3, 9, torch.empty(6, 64)), unpack(packed, backend="reference")[3:9])
