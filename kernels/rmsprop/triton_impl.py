"""rmsprop_ in Triton: one element-wise pass."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _rmsprop_kernel(weight_ptr, gradient_ptr, mean_square_ptr, count, lr, decay, rest, epsilon, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = offs < count
    gradient = tl.load(gradient_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    mean_square = decay * tl.load(mean_square_ptr + offs, mask=keep, other=0.0) + rest * gradient * gradient
    tl.store(mean_square_ptr + offs, mean_square, mask=keep)
    weight = tl.load(weight_ptr + offs, mask=keep, other=0.0)
    tl.store(weight_ptr + offs, weight - lr * gradient / (tl.sqrt(mean_square) + epsilon), mask=keep)


def rmsprop_triton(
    weight: Tensor, gradient: Tensor, mean_square: Tensor, lr: float, decay: float, epsilon: float
) -> None:
    """20 bytes of memory traffic per weight with an fp32 gradient, 18 with a 16-bit one."""
    count = weight.numel()
    if count:
        grid = (triton.cdiv(count, BLOCK),)
        _rmsprop_kernel[grid](
            weight, gradient, mean_square, count, lr, decay, 1 - decay, epsilon, BLOCK=BLOCK, num_warps=8
        )
