"""The CUDA kernels on a GPU, against the references. Without one, test_cuda_on_cpu.py runs the same kernel text."""

import pytest
import torch

from wandapp.errors import TooManyNonZerosError
from wandapp.kernels import dispatch
from wandapp.kernels.pack import pack
from wandapp.kernels.sparse_linear import sparse_linear

OBSTACLE = dispatch.unavailable("pack", "cuda", "cuda") if torch.cuda.is_available() else "there is no GPU"
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=f"the CUDA kernels cannot run here: {OBSTACLE}")


def sparse_weight(rows, cols, dtype):
    """0 to 2 non-zeros per group."""
    order = torch.rand(rows, cols // 4, 4, device="cuda").argsort(-1).view(rows, cols)
    weight = torch.randn(rows, cols, device="cuda").masked_fill(order >= 2, 0.0)
    return weight.masked_fill(torch.rand(rows, cols, device="cuda") < 0.2, 0.0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,cols", [(1, 4), (37, 68), (33, 516), (300, 4096)])
def test_pack_is_bit_equal_to_the_reference(dtype, rows, cols):
    weight = sparse_weight(rows, cols, dtype)
    ours, expected = pack(weight, n=2, m=4, backend="cuda"), pack(weight, n=2, m=4, backend="reference")
    assert torch.equal(ours.values, expected.values) and torch.equal(ours.bitmask, expected.bitmask)


def test_too_many_nonzeros_are_located():
    weight = sparse_weight(40, 640, torch.bfloat16)
    weight[17, 516:519] = weight[30, 4:8] = 1.0
    with pytest.raises(TooManyNonZerosError) as error:
        pack(weight, n=2, m=4, backend="cuda")
    assert (error.value.row, error.value.column) == (17, 516)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])  # about eps / 2 of each
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16])
@pytest.mark.parametrize("rows,cols", [(16, 64), (37, 128), (1000, 2112), (256, 11008)])
def test_sparse_linear_equals_the_dense_product(dtype, tolerance, tokens, rows, cols):
    weight = sparse_weight(rows, cols, dtype)
    x, bias = torch.randn(tokens, cols, device="cuda").to(dtype), torch.randn(rows, device="cuda").to(dtype)
    y = sparse_linear(x, pack(weight, n=2, m=4, backend="reference"), bias, backend="cuda")
    expected = x.double() @ weight.double().T + bias.double()
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
