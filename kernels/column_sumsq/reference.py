"""column_sumsq, literally."""

from torch import Tensor


def column_sumsq_reference(x: Tensor) -> Tensor:
    """[batch, features] fp32 from x [batch, tokens, features]."""
    return x.float().square().sum(dim=1)
