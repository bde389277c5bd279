"""One RMSprop step, in one pass over weight, gradient and state: what regional optimisation does between forwards."""

import torch
from torch import Tensor

from wandapp.kernels import dispatch
from wandapp.kernels.checks import WEIGHT_DTYPES, require


def rmsprop_(
    weight: Tensor,
    gradient: Tensor,
    mean_square: Tensor,
    *,
    lr: float,
    decay: float = 0.99,
    epsilon: float = 1e-8,
    backend: str | None = None,
) -> None:
    """Steps `weight` in place against its gradient, scaled by the running root mean square of past gradients.

    v = decay * v + (1 - decay) * g^2;  w = w - lr * g / (sqrt(v) + epsilon)         (torch.optim.RMSprop's rule)

    weight       any shape, fp32, contiguous
    gradient     weight's shape, fp32, bf16 or fp16, contiguous
    mean_square  weight's shape, fp32, contiguous: v, updated in place; zeros before the first step
    raises       WandappError on a shape, dtype or layout error
    """
    require(
        weight.shape == gradient.shape == mean_square.shape,
        f"weight, gradient and mean_square must have one shape, got {list(weight.shape)}, {list(gradient.shape)}, "
        f"{list(mean_square.shape)}",
    )
    require(weight.dtype == mean_square.dtype == torch.float32, "weight and mean_square must be float32")
    require(gradient.dtype in WEIGHT_DTYPES, f"gradient must be float32, bfloat16 or float16, got {gradient.dtype}")
    require(
        weight.is_contiguous() and gradient.is_contiguous() and mean_square.is_contiguous(),
        "weight, gradient and mean_square must be contiguous; call .contiguous() first",
    )
    _rmsprop_(weight, gradient, mean_square, lr, decay, epsilon, backend)


@torch.library.custom_op("wandapp::rmsprop_", mutates_args=("weight", "mean_square"))
def _rmsprop_(
    weight: Tensor,
    gradient: Tensor,
    mean_square: Tensor,
    lr: float,
    decay: float,
    epsilon: float,
    backend: str | None,
) -> None:
    """Launchers `rmsprop_<backend>` get the validated tensors and the three rates."""
    dispatch.launcher("rmsprop_", weight.device, backend)(weight, gradient, mean_square, lr, decay, epsilon)


@_rmsprop_.register_fake
def _(*_: object) -> None:
    return None
