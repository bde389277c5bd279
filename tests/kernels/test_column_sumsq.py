import pytest
import torch

from wandapp.errors import WandappError
from wandapp.kernels.column_sumsq import column_sumsq


def oracle(x):
    """The equation in fp64."""
    return (x.double() ** 2).sum(-2)


def check(x, backend):
    sums = column_sumsq(x, backend=backend)
    assert sums.dtype == torch.float32
    # fp32 sums of at most 515 positive terms: each addition rounds by 2^-24, in no preferred direction
    torch.testing.assert_close(sums.double(), oracle(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (0, 16), (7, 0), (3, 4097), (2, 3, 40, 65), (515, 300), (0, 4, 8)])
def test_equals_the_equation(shape, dtype, backend):
    check(torch.randn(shape).to(dtype), backend)


def test_hand_computed(backend):
    x = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 0.5]])
    assert column_sumsq(x, backend=backend).tolist() == [10.0, 4.0, 0.5]


def test_strided_input(dtype, backend):
    wide = torch.randn(9, 6, 50).to(dtype)
    check(wide[::2, 1:5, 3:40], backend)
    check(wide.mT, backend)


def test_denormals_are_squared_not_flushed(backend):
    x = torch.full((2, 20), 2.0**-70)
    assert column_sumsq(x, backend=backend).tolist() == [2.0**-139] * 20


def test_many_tokens_stay_accurate():
    x = torch.full((1 << 17, 16), 0.1)
    torch.testing.assert_close(column_sumsq(x).double(), oracle(x), rtol=1e-5, atol=0)


def test_result_does_not_depend_on_threads():
    x = torch.randn(300, 1000)
    both = column_sumsq(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(column_sumsq(x), both)
    finally:
        torch.set_num_threads(threads)


def test_rejects_vectors_and_integers():
    with pytest.raises(WandappError, match=r"\[\.\.\., tokens, features\]"):
        column_sumsq(torch.ones(3))
    with pytest.raises(WandappError, match="float32, bfloat16 or float16"):
        column_sumsq(torch.ones(3, 4, dtype=torch.int32))
