"""Regional optimisation of Wanda++ (arXiv:2503.04992), a refiner around any method.

    repeat K rounds: draw M of the N samples; prune with the method's score;
                     one RMSprop step per sample on ||f(x) - f_pruned(x)||^2 (sum), zeroed weights included
    prune with the method's score

f is the dense block on the pruned path's inputs; its outputs are computed once per block. Weights are fp32 masters, the
optimiser's state lives as long as its block. A method that compensates (SparseGPT) is applied once, before the first
round; the rounds then choose by its score |W_ij| / U_jj.
Differs from a literal reading: the input norms of a drawn sample are those of its latest forward (the dense pass, later
its own optimisation steps), so that no forward is spent on norms alone.

With R ranks a step takes one sample of each rank, so a round has M/R steps. A step of k samples uses the rate lr * k and the
decay 0.99^k of the mean square: where samples pull a weight the same way, k steps of one sample move it as far (the linear
rule, arXiv:1706.02677). docs/distributed.md has what the square-root rule, for gradients that are mostly noise, gave.
"""

from itertools import zip_longest

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.distributed import Share, even_counts
from wandapp.kernels.column_sumsq import column_sumsq
from wandapp.kernels.rmsprop import rmsprop_
from wandapp.methods.base import BlockRecord, Method, output_error
from wandapp.methods.refiner import (
    LossScale,
    Masters,
    Refinement,
    Refiner,
    block_generator,
    linear_parameters,
    zero_skipped_,
)
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements

DECAY = 0.99  # of the mean square, per sample


class RegionalOptimisation(Refiner):
    """Rounds of pruning and of gradient steps on one block."""

    title = "regional optimisation"

    @property
    def is_idle(self) -> bool:
        return self.config.ro_rounds == 0

    def refine(self, block: DecoderBlock, hidden: Tensor, measured: Measurements, refinement: Refinement) -> None:
        if not self.method.compensates:  # the first round prunes the dense weights, with its own samples' norms
            refinement.dense.restore()
        optimisation = _Optimisation(self.scorer, block, hidden, measured)
        optimisation.run(refinement.pattern)
        optimisation.loss_scale.tell(f"{block.name}: regional optimisation", refinement.warnings)


class _Optimisation:
    """K rounds on one block."""

    def __init__(self, method: Method, block: DecoderBlock, hidden: Tensor, measured: Measurements):
        self.method, self.block, self.hidden, self.measured = method, block, hidden, measured
        self.config, self.ranks = method.config, method.ranks
        assert self.config.ro_lr is not None and self.config.ro_loss is not None  # the preset's, if nobody gave any
        self.lr, self.loss = self.config.ro_lr, self.config.ro_loss
        self.parameters = linear_parameters(block)
        self.masters, self.loss_scale = Masters(self.parameters), LossScale(self.parameters)
        self.mean_square = {p: torch.zeros_like(master) for p, master in self.masters.values.items()}
        self.learning_rate = {p: self._learning_rate(master, p.dtype) for p, master in self.masters.values.items()}

    def run(self, pattern: SparsityPattern) -> None:
        generator = block_generator(self.config.seed, self.block.index)
        for _ in range(self.config.ro_rounds):
            drawn = draw(self.measured.share, self.config.ro_samples, generator)
            self._prune(pattern, torch.cat(drawn))
            for step in zip_longest(*(samples.tolist() for samples in drawn)):
                self._step(step)
        self._prune(pattern, None)
        self.masters.store()

    def _prune(self, pattern: SparsityPattern, drawn: Tensor | None) -> None:
        for norm in dict.fromkeys(self.measured.norms.values()):
            norm.merge_(self.ranks, self.measured.share.rows)
        measured = self.measured.among(drawn)
        for view in self.block.linears.values():
            terms = self.method.checked_terms(view, measured, BlockRecord(self.block.name))
            self.method.prune_linear_(view, view.of(self.masters.values[view.parameter]), terms, pattern)

    def _step(self, samples: tuple[int | None, ...]) -> None:
        """One RMSprop step on the summed squared distance of one sample's outputs per rank; None: that rank has no more."""
        self.masters.store()
        gradients = self.loss_scale.run(lambda scale: self._gradients(samples[self.ranks.rank], scale))
        count = sum(sample is not None for sample in samples)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            rate = self.learning_rate[parameter] * count
            rmsprop_(self.masters.values[parameter], gradient, self.mean_square[parameter], lr=rate, decay=DECAY**count)

    def _gradients(self, own: int | None, scale: float) -> list[Tensor]:
        """Each parameter's gradient, all ranks' sum; in the parameter's type, or fp32 where the loss was scaled."""
        if own is not None:
            self._backward(own, scale)
        gradients = {p: torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in self.parameters}
        zero_skipped_(self.block, gradients)
        for parameter in self.parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        return [self.ranks.sum_(g if scale == 1.0 else g.float().div_(scale)) for g in gradients.values()]

    def _backward(self, sample: int, scale: float) -> None:
        """Gradients of the parameters by one sample's scaled loss; refreshes the sample's input norms in passing."""
        refreshed: set[int] = set()

        def refresh_norm(view: LinearView, x: Tensor, y: Tensor | None) -> None:
            norm = self.measured.norms.get(view.name)
            if norm is not None and id(norm) not in refreshed:
                refreshed.add(id(norm))
                norm.sumsq[sample] = column_sumsq(x.detach().reshape(-1, x.shape[-1]))

        row = sample - self.measured.share.start
        with torch.enable_grad():
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            output = self.block.watch(self.hidden[row : row + 1], refresh_norm)
            assert output is not None
            loss = scale * output_error(output, self.measured.outputs[row : row + 1], self.loss).sum()
            self.block.backward(loss, tokens=output.shape[1])

    def _learning_rate(self, master: Tensor, storage: torch.dtype) -> float:
        """Step size of one parameter.

        "weight-rms": a fraction of the matrix's RMS. "absolute": as given, but where the checkpoint stores 16 bits at least
        so large that all steps together can move an average weight to the next value that storage knows.
        """
        rms = master.square().mean().sqrt().item()
        if self.config.ro_lr_unit == "weight-rms":
            return self.lr * rms
        if storage == torch.float32:
            return self.lr
        steps = self.config.ro_rounds * min(self.config.ro_samples, self.measured.samples)
        return max(self.lr, rms * torch.finfo(storage).eps / steps)


def draw(share: Share, samples: int, generator: torch.Generator) -> list[Tensor]:
    """Up to `samples` distinct samples, evenly from all ranks: each rank's drawn ones, as indices among all."""
    starts = [Share(rank, share.counts).start for rank in range(len(share.counts))]
    drawn = even_counts(min(samples, share.total), len(share.counts))
    return [
        start + torch.randperm(count, generator=generator)[:number]
        for start, count, number in zip(starts, share.counts, drawn, strict=True)
    ]
