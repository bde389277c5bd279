"""Block reconstruction: with the mask fixed, the kept weights of a block learn to give the dense block's outputs.

    minimise over kept weights, biases and norm weights    sum_n || D_n (f(X_n) - f_pruned(X_n)) ||^2

X_n are the pruned path's inputs of sample n; D_n divides each token by the RMS of its target (loss "token") or is the
identity ("frobenius"); f is the dense block on the same inputs.
Adam on fp32 masters, all samples once a pass in random batches, linear warm-up over the first tenth of the steps, then a
cosine to zero. The rate of each parameter is a fraction of its own RMS, so one setting serves every scale. Leading samples
are held out, and the weights of the best pass by their error are kept. Biases and norm weights cost nothing at inference.
"""

import math
from collections.abc import Iterator
from itertools import zip_longest

import torch
from torch import Tensor, nn

from wandapp.blocks import DecoderBlock
from wandapp.distributed import Share
from wandapp.methods.base import ERROR_SAMPLES, block_error, output_error
from wandapp.methods.refiner import Refinement, Refiner, Snapshot, linear_parameters
from wandapp.statistics import Measurements

WARM_UP = 0.1  # of all steps
BETAS, EPSILON = (0.9, 0.95), 1e-20  # gradients of a normalised loss are tiny; masked ones are exactly zero


class Reconstruction(Refiner):
    """Masked training of one block at a time, on batches of all calibration samples."""

    title = "reconstruction"

    @property
    def is_idle(self) -> bool:
        return self.config.reconstruct_passes == 0

    @property
    def loss(self) -> str:  # type: ignore[override]  # a class's constant elsewhere, an option here
        return self.config.reconstruct_loss

    def parameters(self, block: DecoderBlock) -> list[nn.Parameter]:
        """The pruned linear maps, and every vector of the block: norm weights and biases."""
        return [*linear_parameters(block), *(p for p in block.module.parameters() if p.dim() == 1)]

    def refine(self, block: DecoderBlock, hidden: Tensor, measured: Measurements, refinement: Refinement) -> None:
        _Training(self, block, hidden, measured).run()


class _Training:
    """All passes over one block. masters: fp32 values by parameter (the parameter itself where storage is fp32)."""

    def __init__(self, method: Reconstruction, block: DecoderBlock, hidden: Tensor, measured: Measurements):
        self.block, self.hidden, self.targets = block, hidden, measured.outputs
        self.config, self.ranks, self.share = method.config, method.ranks, measured.share
        self.parameters = method.parameters(block)
        self.masters = {p: p.data if p.dtype == torch.float32 else p.data.float() for p in self.parameters}
        self.keep = {p: self.masters[p] != 0 for p in linear_parameters(block)}
        self.held_out = (
            ERROR_SAMPLES if self.share.total > 2 * ERROR_SAMPLES else 0
        )  # of few samples all are trained on
        self.probe = slice(0, self.share.leading(ERROR_SAMPLES))
        self.generator = torch.Generator().manual_seed(self.config.seed * 100_003 + block.index)

    def run(self) -> None:
        passes = self.config.reconstruct_passes
        optimiser = torch.optim.Adam(
            [{"params": [master], "lr": self._rate(master)} for master in self.masters.values()],
            betas=BETAS,
            eps=EPSILON,
        )
        steps = passes * len(list(self._batches()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, steps))
        best, best_error = Snapshot(self.parameters), self._error()
        for _ in range(passes):
            for rows in self._batches():
                self._set_gradients(rows)
                optimiser.step()
                schedule.step()
                self._store()
            error = self._error()
            if error < best_error:
                best, best_error = Snapshot(self.parameters), error
        best.restore()

    def _rate(self, master: Tensor) -> float:
        kept = master[master != 0]
        return self.config.reconstruct_lr * kept.square().mean().sqrt().item() if len(kept) else 0.0

    def _batches(self) -> Iterator[tuple[Tensor | None, ...]]:
        """One pass: each step's rows of every rank, in a random order that all ranks know; None: that rank has no more."""
        size = max(self.block.calls)
        return zip_longest(*(self._order(rank, size) for rank in range(self.ranks.size)))

    def _order(self, rank: int, size: int) -> list[Tensor]:
        held_out = Share(rank, self.share.counts).leading(self.held_out)
        count = self.share.counts[rank] - held_out
        order = held_out + torch.randperm(count, generator=self.generator)
        size = size if count >= size else 1  # only recorded batch sizes can run
        return list(order[: count // size * size].split(size))

    def _set_gradients(self, rows: tuple[Tensor | None, ...]) -> None:
        """Gradients of the masters by the summed loss of one step's samples on all ranks; removed weights get none."""
        own = rows[self.ranks.rank]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        if own is not None:
            with torch.enable_grad():
                output = self.block(self.hidden[own])
                loss = output_error(output, self.targets[own], self.config.reconstruct_loss).sum()
                self.block.backward(loss, tokens=output.shape[0] * output.shape[1])
        for parameter, master in self.masters.items():
            gradient = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            master.grad = self.ranks.sum_(gradient.contiguous())
            if parameter in self.keep:
                master.grad.mul_(self.keep[parameter])
            parameter.grad = None
            parameter.requires_grad_(False)

    def _error(self) -> float:
        probe = self.probe
        return block_error(
            self.block, self.hidden[probe], self.targets[probe], self.ranks, kind=self.config.reconstruct_loss
        )

    def _store(self) -> None:
        for parameter, master in self.masters.items():
            if master.data_ptr() != parameter.data_ptr():
                parameter.data.copy_(master)


def rate_factor(step: int, steps: int) -> float:
    """Warm-up from 0 to 1 over the first tenth of the steps, then a cosine down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
