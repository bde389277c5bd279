"""Gradient descent as reconstruction and tuning do it: Adam, a step for every sample, rates relative to what is trained."""

import math
from collections.abc import Iterable, Iterator
from itertools import zip_longest

import torch
from torch import Tensor

from wandapp.distributed import Ranks, Share
from wandapp.kernels.native import multiplies_bfloat16

WARM_UP = 0.1  # of all steps
BETAS, EPSILON = (0.9, 0.95), 1e-20  # gradients of a normalised loss are tiny; masked ones are exactly zero


class Descent:
    """Adam on fp32 values, each with a rate of `lr` times its own RMS; warm-up over a tenth of the steps, then a cosine to 0.

    A step takes one sample of every rank; the first `held_out` of the job's samples are left alone.
    """

    def __init__(
        self,
        values: Iterable[Tensor],
        *,
        lr: float,
        passes: int,
        share: Share,
        ranks: Ranks,
        held_out: int,
        generator: torch.Generator,
    ):
        self.share, self.ranks, self.held_out = share, ranks, held_out
        self.generator = generator
        groups = [{"params": [value], "lr": lr * _rms(value)} for value in values]
        self.optimiser = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
        steps = passes * max(share.counts[rank] - self._held_out(rank) for rank in range(ranks.size))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: rate_factor(step, steps))

    def one_pass(self) -> Iterator[Tensor | None]:
        """This rank's row [1] of each step, all once in a random order that all ranks know; None: it has no more."""
        return (rows[self.ranks.rank] for rows in zip_longest(*map(self._order, range(self.ranks.size))))

    def step(self) -> None:
        """One step by the values' gradients."""
        self.optimiser.step()
        self.schedule.step()

    def _held_out(self, rank: int) -> int:
        return Share(rank, self.share.counts).leading(self.held_out)

    def _order(self, rank: int) -> tuple[Tensor, ...]:
        held_out = self._held_out(rank)
        order = held_out + torch.randperm(self.share.counts[rank] - held_out, generator=self.generator)
        return order.unsqueeze(1).unbind()  # none of nothing, of which split makes one


def _rms(value: Tensor) -> float:
    """Of what is not zero."""
    kept = value.detach()[value != 0]
    return kept.square().mean().sqrt().item() if len(kept) else 0.0


def rate_factor(step: int, steps: int) -> float:
    """Warm-up from 0 to 1 over the first tenth of the steps, then a cosine down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def product_type(device: torch.device, compute: str | None) -> torch.autocast:
    """The type of a step's products (PruneConfig.reconstruct_compute); losses and what is trained are fp32."""
    enabled = compute == "bfloat16" or compute == "auto" and multiplies_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
