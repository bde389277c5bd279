import pytest
import torch

from wandapp.errors import WandappError
from wandapp.kernels.pack import Packed, pack
from wandapp.kernels.select import prune_nm_
from wandapp.kernels.sparse_linear import sparse_linear

# One rounding of the output to its type, and fp32 sums of up to 4097 products.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def oracle(x, weight, bias):
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def check(y, x, weight, bias=None):
    """Errors are measured against the sum of the absolute products: cancellation is not the kernel's fault."""
    assert y.dtype == weight.dtype and y.shape == (*x.shape[:-1], len(weight))
    size = oracle(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = (y.double() - oracle(x, weight, bias)).abs()
    assert (error <= TOLERANCE[weight.dtype] * size + 1e-7).all(), (error / size.clamp_min(1e-30)).max()


def sparse_weight(rows, cols, pattern, dtype):
    weight = torch.randn(rows, cols).to(dtype)
    if pattern is None:
        return weight * (torch.rand(rows, cols) < 0.5)
    prune_nm_(weight, n=pattern[0], m=pattern[1])
    return weight


def packed_of(weight, pattern):
    return pack(weight) if pattern is None else pack(weight, n=pattern[0], m=pattern[1])


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 261])
@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 5)], ids=["unstructured", "2:4", "3:5"])
def test_equals_the_dense_product(tokens, pattern, dtype, backend):
    weight = sparse_weight(50, 120, pattern, dtype)
    x, bias = torch.randn(tokens, 120).to(dtype), torch.randn(50).to(dtype)
    check(sparse_linear(x, packed_of(weight, pattern), bias, backend=backend), x, weight, bias)
    check(sparse_linear(x, packed_of(weight, pattern), backend=backend), x, weight)


@pytest.mark.parametrize("shape", [(0, 16), (7, 0), (1, 1), (4, 37), (3, 48), (2, 4097), (100, 8), (33, 256)])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_odd_shapes_and_densities(shape, density, dtype, backend):
    weight = (torch.randn(shape) * (torch.rand(shape) < density)).to(dtype)
    x = torch.randn(3, shape[1]).to(dtype)
    check(sparse_linear(x, pack(weight), backend=backend), x, weight)


def test_a_weight_without_rows_takes_many_tokens(dtype, backend):
    assert sparse_linear(
        torch.ones(18, 8, dtype=dtype), pack(torch.ones(0, 8, dtype=dtype)), backend=backend
    ).shape == (18, 0)


def test_leading_axes_and_strided_x(dtype, backend):
    weight = sparse_weight(12, 32, (2, 4), dtype)
    x = torch.randn(4, 2, 3, 64).to(dtype)[::2, ..., ::2]
    check(sparse_linear(x, pack(weight, n=2, m=4), backend=backend), x, weight)
    check(sparse_linear(x[0, 0, 0], pack(weight, n=2, m=4), backend=backend), x[0, 0, 0], weight)


@pytest.mark.parametrize(
    ("tokens", "rows", "cols"), [(3, 40, 96), (29, 67, 96), (9, 33, 1100), (257, 40, 37), (300, 131, 1200)]
)
def test_integers_are_exact(tokens, rows, cols, dtype, backend):
    """Small integers leave nothing to rounding: every weight must meet its own input."""
    weight = torch.randint(-2, 3, (rows, cols)).to(dtype)
    x = torch.randint(-1, 2, (tokens, cols)).to(dtype)
    assert torch.equal(sparse_linear(x, pack(weight), backend=backend), oracle(x, weight, None).to(dtype))


def test_reads_nothing_beyond_the_values(dtype, backend):
    """The values end at the end of a buffer whose rest is NaN: a lane of it in any sum would show."""
    weight = sparse_weight(37, 68, (2, 4), dtype)
    packed = pack(weight, n=2, m=4)
    buffer = torch.full((packed.values.numel() + 64,), float("nan"), dtype=dtype)
    values = buffer[: packed.values.numel()].view(packed.values.shape)
    values.copy_(packed.values)
    x = torch.randn(2, 68).to(dtype)
    check(sparse_linear(x, packed._replace(values=values), backend=backend), x, weight)


@pytest.mark.parametrize("tokens", [1, 7])
def test_nan_in_x_reaches_every_output_of_its_token(tokens, dtype, backend):
    """As in the dense product, where a zero weight times NaN is NaN."""
    x = torch.zeros(tokens, 32, dtype=dtype)
    x[0, 5] = float("nan")
    y = sparse_linear(x, pack(sparse_weight(9, 32, (2, 4), dtype)), backend=backend)
    assert y[0].isnan().all() and not y[1:].isnan().any()


def test_many_tokens_skip_what_is_not_kept():
    """In fp32: a NaN in a column reaches the rows that keep it, and no others."""
    weight = torch.eye(40)
    x = torch.ones(300, 40)
    x[7, 5] = float("nan")
    y = sparse_linear(x, pack(weight))
    assert y[7, 5].isnan() and y.isnan().sum() == 1


def test_denormal_weights_are_not_flushed(backend):
    """In fp32; vdpbf16ps takes denormal bf16 weights for zero."""
    weight = torch.full((2, 32), 1e-44)
    assert (sparse_linear(torch.full((1, 32), 2.0**20), pack(weight), backend=backend) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_output_rounds_to_nearest_even(dtype, backend):
    eps = torch.finfo(dtype).eps
    x = torch.tensor([[1.0, 1.0 + eps, 0, 0]]).to(dtype)
    bias = torch.tensor([eps / 2, eps / 2]).to(
        dtype
    )  # both sums lie half way: one above an even number, one above an odd
    y = sparse_linear(x, pack(torch.eye(2, 4).to(dtype)), bias, backend=backend)
    assert y.tolist() == [[1.0, 1.0 + 2 * eps]]


@pytest.mark.parametrize("tokens", [2, 270])
def test_result_does_not_depend_on_threads(tokens, dtype):
    weight = sparse_weight(300, 128, (2, 4), dtype)
    x, packed, threads = torch.randn(tokens, 128).to(dtype), pack(weight, n=2, m=4), torch.get_num_threads()
    both = sparse_linear(x, packed)
    torch.set_num_threads(1)
    try:
        assert torch.equal(sparse_linear(x, packed), both)
    finally:
        torch.set_num_threads(threads)


def test_rejects_what_does_not_fit():
    packed = pack(torch.eye(4))
    with pytest.raises(WandappError, match=r"x must be torch.float32 \[..., 4\]"):
        sparse_linear(torch.ones(2, 5), packed)
    with pytest.raises(WandappError, match="x must be torch.float32"):
        sparse_linear(torch.ones(2, 4).half(), packed)
    with pytest.raises(WandappError, match=r"bias must be torch.float32 \[4\]"):
        sparse_linear(torch.ones(2, 4), packed, torch.ones(3))
    with pytest.raises(WandappError, match="bitmask must be"):
        sparse_linear(torch.ones(2, 4), Packed(packed.values, packed.bitmask[:2], packed.row_offsets, (4, 4), None))
