"""Score and choice, literally: form the score matrix, sort it stably, keep the first."""

import torch
from torch import Tensor

from wandapp.kernels.bitmask import pack_bits


def score(weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, alpha: float) -> Tensor:
    """|weight_ij| * (alpha * gradient_ij + column_scale_j) in fp32, multiplication and addition rounded separately."""
    factor = torch.ones((), device=weight.device) if column_scale is None else column_scale
    if gradient is not None:
        factor = alpha * gradient + factor
    return weight.float().abs() * factor


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest along the last axis; a stable sort keeps the lower index among equals."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def first_nonfinite(scores: Tensor) -> int:
    """Flat index of the first NaN or Inf, else -1."""
    offenders = scores.isfinite().logical_not().flatten().nonzero()
    return int(offenders[0]) if len(offenders) else -1


def select_nm_reference(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, *, n: int, m: int, alpha: float
) -> tuple[Tensor, int]:
    scores = score(weight, column_scale, gradient, alpha)
    groups = scores.reshape(weight.shape[0], weight.shape[1] // m, m)
    return largest(groups, n).view(weight.shape), first_nonfinite(scores)


def select_rows_reference(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, *, keep: int, alpha: float
) -> tuple[Tensor, int]:
    scores = score(weight, column_scale, gradient, alpha)
    return largest(scores, keep), first_nonfinite(scores)


def prune_nm_reference(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, *, n: int, m: int, alpha: float
) -> tuple[Tensor, int]:
    return _zero_removed(weight, *select_nm_reference(weight, column_scale, gradient, n=n, m=m, alpha=alpha))


def prune_rows_reference(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, *, keep: int, alpha: float
) -> tuple[Tensor, int]:
    return _zero_removed(weight, *select_rows_reference(weight, column_scale, gradient, keep=keep, alpha=alpha))


def prune_pack_nm_reference(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, *, n: int, m: int, alpha: float
) -> tuple[Tensor, Tensor, int]:
    mask, offender = select_nm_reference(weight, column_scale, gradient, n=n, m=m, alpha=alpha)
    bitmask, offender = _zero_removed(weight, mask, offender)
    return weight[mask].view(weight.shape[0], weight.shape[1] // m * n), bitmask, offender


def _zero_removed(weight: Tensor, mask: Tensor, offender: int) -> tuple[Tensor, int]:
    if offender < 0:
        weight.masked_fill_(~mask | (weight == 0), 0.0)  # weight == 0 holds for -0.0 too
    return pack_bits(mask), offender
