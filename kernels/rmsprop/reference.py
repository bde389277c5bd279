"""rmsprop_ as its equation."""

from torch import Tensor


def rmsprop_reference(
    weight: Tensor, gradient: Tensor, mean_square: Tensor, lr: float, decay: float, epsilon: float
) -> None:
    """v = decay * v + (1 - decay) * g^2;  w = w - lr * g / (sqrt(v) + epsilon), fp32."""
    gradient = gradient.float()
    mean_square.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
    weight.sub_(lr * gradient / (mean_square.sqrt() + epsilon))
