"""rmsprop_ against its equation in float64, against torch's optimiser, and over every instruction set and dtype."""

import pytest
import torch

from wandapp import _C
from wandapp.errors import WandappError
from wandapp.kernels.rmsprop import rmsprop_
from wandapp.kernels.rmsprop.cpu import rmsprop_cpu

ISAS = [isa for isa in ("portable", "avx2", "avx512") if _C.isa_runs_here(isa)]
# Seven fp32 roundings, and 1 - decay formed in fp32 (relative error 1e-6 at 0.99); the last subtraction may cancel, so
# its error is that of operands up to 4 (ulp 4.8e-7).
TOLERANCE = {"rtol": 5e-6, "atol": 5e-7}


def case(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    return weight, gradient.to(dtype), torch.rand(shape, generator=generator)


def expected(weight, gradient, mean_square, lr, decay=0.99, epsilon=1e-8):
    weight, gradient, mean_square = weight.double(), gradient.double(), mean_square.double()
    mean_square = decay * mean_square + (1 - decay) * gradient**2
    return weight - lr * gradient / (mean_square.sqrt() + epsilon), mean_square


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (37, 3), (3, 16411)])
def test_equals_the_equation(isa, dtype, shape):
    weight, gradient, mean_square = case(shape, dtype)
    want_weight, want_mean_square = expected(weight, gradient, mean_square, 0.1)
    rmsprop_cpu(weight, gradient, mean_square, 0.1, 0.99, 1e-8, isa=isa)
    torch.testing.assert_close(weight.double(), want_weight, **TOLERANCE)
    torch.testing.assert_close(mean_square.double(), want_mean_square, **TOLERANCE)


def test_many_steps_equal_torch_optim():
    weight, _, _ = case((64, 33))
    ours, mean_square = weight.clone(), torch.zeros_like(weight)
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.RMSprop([parameter], lr=1e-2)
    for step in range(20):
        parameter.grad = case((64, 33), seed=step + 1)[1]
        optimizer.step()
        rmsprop_(ours, parameter.grad, mean_square, lr=1e-2)
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_zero_gradient_moves_nothing():
    weight, gradient, mean_square = case((5, 40))
    before = weight.clone()
    rmsprop_(weight, torch.zeros_like(gradient), torch.zeros_like(mean_square), lr=1.0)
    assert torch.equal(weight, before)


def test_reference_agrees():
    weight, gradient, mean_square = case((9, 21))
    copies = [tensor.clone() for tensor in (weight, gradient, mean_square)]
    rmsprop_(weight, gradient, mean_square, lr=0.1)
    rmsprop_(*copies, lr=0.1, backend="reference")
    torch.testing.assert_close(weight, copies[0], **TOLERANCE)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, g, v: (w, g[:1], v), "one shape"),
        (lambda w, g, v: (w.half(), g, v), "must be float32"),
        (lambda w, g, v: (w, g.int(), v), "gradient must be"),
        (lambda w, g, v: (w.T, g.T, v.T), "contiguous"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(WandappError, match=message):
        rmsprop_(*change(*case((3, 4))), lr=0.1)
