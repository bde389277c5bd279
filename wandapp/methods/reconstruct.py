"""Block reconstruction: the weights that a block keeps learn to give the dense model's states.

    minimise over kept weights, biases and norm weights    sum_n || D_n (T_n - f_pruned(X_n)) ||^2

X_n are the pruned path's inputs of sample n; T_n the dense block's outputs on them (target "pruned-path") or the dense
model's own states at this depth ("dense-path": the block also mends what the blocks before it spoilt). D_n divides each
token by the RMS of its target (loss "token") or is the identity ("frobenius").

Adam on fp32 masters, a step per sample, all samples once a pass in random order, linear warm-up over the first tenth of
the steps, then a cosine to zero. The rate of each parameter is a fraction of its own RMS, so one setting serves every
scale. Leading samples are held out, and the weights of the best pass by their error are kept. Biases and norm weights cost
nothing at inference.

With region "sub-block" all that attention's products depend on is trained by their error alone, towards the dense block's on
X_n; then the rest of the block, as above.
"""

import operator
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor, nn

from wandapp.blocks import DecoderBlock
from wandapp.descent import Descent, product_type
from wandapp.distributed import Share
from wandapp.methods.base import ERROR_SAMPLES, BlockRecord, block_error, output_error
from wandapp.methods.refiner import (
    LossScale,
    Masters,
    Refinement,
    Refiner,
    Snapshot,
    block_generator,
    linear_parameters,
    zero_skipped_,
)
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements


class Reconstruction(Refiner):
    """Training of one block at a time under its mask, on all calibration samples."""

    title = "reconstruction"
    attention: "Region | None" = None  # the block in work: its first sub-block, where that is trained by itself

    @property
    def is_idle(self) -> bool:
        return self.config.reconstruct_passes == 0

    @property
    def loss(self) -> str:
        return self.config.reconstruct_loss

    @property
    def follows_dense_path(self) -> bool:
        return super().follows_dense_path or self.config.reconstruct_target == "dense-path" and not self.is_idle

    @property
    def outputs_read(self) -> int | None:
        """All, as targets; along the dense path only what the method inside reads."""
        return self.method.outputs_read if self.follows_dense_path else None

    @property
    def reads_samples(self) -> bool:
        return True

    def targets(self, measured: Measurements) -> Tensor:
        return measured.outputs if measured.dense_path is None else measured.dense_path

    def parameters(self, block: DecoderBlock) -> list[nn.Parameter]:
        """The pruned linear maps, and every vector of the block: norm weights and biases."""
        return [*linear_parameters(block), *(p for p in block.module.parameters() if p.dim() == 1)]

    def transform(
        self, block: DecoderBlock, hidden: Tensor, measured: Measurements, pattern: SparsityPattern, record: BlockRecord
    ) -> None:
        self.attention = None
        if self.config.reconstruct_region == "sub-block" and not self.is_idle:
            self.attention = self._dense_attention(block, hidden)
            if self.attention is None:
                record.warnings.append(
                    f"{block.name}: reconstructed as a whole, for want of pruned maps in front of others"
                )
        super().transform(block, hidden, measured, pattern, record)

    @torch.no_grad()
    def _dense_attention(self, block: DecoderBlock, hidden: Tensor) -> "Region | None":
        """Attention's products, from the block before it is pruned, as targets; what is trained towards them follows later."""
        end = next(filter(None, self.ranks.gather(block.attention_end)), None)
        if end is None:
            return None
        products = hidden.new_empty(*hidden.shape[:2], len(block.all_linears[end].weight))
        for rows in block.batches(len(hidden)):
            products[rows] = block(hidden[rows], end)
        return Region(products, [], until=end)

    def refine(self, block: DecoderBlock, hidden: Tensor, measured: Measurements, refinement: Refinement) -> None:
        rest = Region(self.targets(measured), self.parameters(block))
        if self.attention is not None:
            first, self.attention = self.attention, None
            reached = self._reached(block, hidden, first)
            first.parameters = list(compress(rest.parameters, reached))
            rest.parameters = list(compress(rest.parameters, map(operator.not_, reached)))
            rest.since = first.until
            _Training(self, block, hidden, measured.share, first).run(refinement.warnings)
            del first  # its targets are as large as hidden
        _Training(self, block, hidden, measured.share, rest).run(refinement.warnings)

    def _reached(self, block: DecoderBlock, hidden: Tensor, region: "Region") -> list[bool]:
        """Which of the block's parameters the region's products depend on, told by the gradients of one sample."""
        parameters = self.parameters(block)
        if len(hidden):  # a rank without samples is told by the others
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                products = block(hidden[:1], region.until)
                block.backward(products.float().sum(), tokens=hidden.shape[1], with_vectors=True, until=region.until)
        found = [parameter.grad is not None for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        return next(filter(any, self.ranks.gather(found)))


@dataclass
class Region:
    """What is trained together, and towards what.

    targets      [samples, seq_len, features] of this rank's samples
    parameters   linear maps' and vectors
    until        the linear map whose products are to meet the targets; None: the block's outputs are
    since        the linear map up to which all is trained already
    """

    targets: Tensor
    parameters: list[nn.Parameter]
    until: str | None = None
    since: str | None = None


class _Training:
    """All passes over one region.

    masters   fp32 values of what is trained
    keep      1.0 where a weight is kept and 0.0 elsewhere, by parameter; vectors have none
    """

    def __init__(self, method: Reconstruction, block: DecoderBlock, hidden: Tensor, share: Share, region: Region):
        self.block, self.hidden, self.region = block, hidden, region
        self.config, self.ranks, self.share = method.config, method.ranks, share
        self.masters = Masters(region.parameters)
        self.keep = {p: (value != 0).float() for p, value in self.masters.values.items() if p.dim() > 1}
        zero_skipped_(block, self.keep)
        self.loss_scale = LossScale(region.parameters)
        # of few samples all are trained on
        self.held_out = ERROR_SAMPLES if self.share.total > 2 * ERROR_SAMPLES else 0
        self.probe = slice(0, self.share.leading(ERROR_SAMPLES))

    def run(self, warnings: list[str]) -> None:
        if not self.region.parameters:
            return
        passes = self.config.passes_of_reconstruction(self.share.total)
        descent = Descent(
            self.masters.values.values(),
            lr=self.config.reconstruct_lr,
            passes=passes,
            share=self.share,
            ranks=self.ranks,
            held_out=self.held_out,
            generator=block_generator(self.config.seed, self.block.index),
        )
        best, best_error = Snapshot(self.region.parameters), self._error()
        initial = best
        for _ in range(passes):
            for own in descent.one_pass():
                self._set_gradients(own)
                descent.step()
                self.masters.store()
            error = self._error()
            if error < best_error:
                best, best_error = Snapshot(self.region.parameters), error
        best.restore()
        self.loss_scale.tell(f"{self.block.name}: reconstruction", warnings)
        if best is initial:
            part = self.region.until or self.block.name
            warnings.append(
                f"{part}: no pass of reconstruction left less than the error of {best_error:.4g} before it; the weights "
                "before it were kept"
            )

    def _set_gradients(self, own: Tensor | None) -> None:
        """Gradients of the masters by the summed loss of one step's samples on all ranks; removed weights get none."""
        self.loss_scale.run(lambda scale: self._gradients(own, scale))

    def _gradients(self, own: Tensor | None, scale: float) -> list[Tensor]:
        region = self.region
        for parameter in region.parameters:
            parameter.requires_grad_(True)
        if own is not None:
            device = next(self.block.module.parameters()).device
            with torch.enable_grad(), product_type(device, self.config.reconstruct_compute):
                output = self.block(self.hidden[own], region.until)
                loss = scale * output_error(output, region.targets[own], self.config.reconstruct_loss).sum()
                self.block.backward(
                    loss,
                    tokens=output.shape[0] * output.shape[1],
                    with_vectors=True,
                    until=region.until,
                    since=region.since,
                )
        return self.masters.take_gradients(self.ranks, self.keep, scale)

    def _error(self) -> float:
        region, probe = self.region, self.probe
        hidden, targets = self.hidden[probe], region.targets[probe]
        return block_error(self.block, hidden, targets, self.ranks, self.config.reconstruct_loss, region.until)
