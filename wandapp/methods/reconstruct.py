"""Block reconstruction: the weights that a block keeps learn to give the dense model's states.

    minimise over kept weights, biases and norm weights    sum_n || D_n (T_n - f_pruned(X_n)) ||^2

X_n are the pruned path's inputs of sample n; T_n the dense block's outputs on them (target "pruned-path") or the dense
model's own states at this depth ("dense-path": the block also mends what the blocks before it spoilt). D_n divides each
token by the RMS of its target (loss "token") or is the identity ("frobenius").

Adam on fp32 masters, a step per sample, all samples once a pass in random order, linear warm-up over the first tenth of
the steps, then a cosine to zero. The rate of each parameter is a fraction of its own RMS, so one setting serves every
scale. Leading samples are held out, and the weights of the best pass by their error are kept. Biases and norm weights cost
nothing at inference.
"""

import torch
from torch import Tensor, nn

from wandapp.blocks import DecoderBlock
from wandapp.descent import Descent, product_type
from wandapp.methods.base import ERROR_SAMPLES, block_error, output_error
from wandapp.methods.refiner import Masters, Refinement, Refiner, Snapshot, linear_parameters
from wandapp.statistics import Measurements


class Reconstruction(Refiner):
    """Training of one block at a time under its mask, on all calibration samples."""

    title = "reconstruction"

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

    def refine(self, block: DecoderBlock, hidden: Tensor, measured: Measurements, refinement: Refinement) -> None:
        _Training(self, block, hidden, measured).run()


class _Training:
    """All passes over one block.

    masters   fp32 values of what is trained
    keep      1.0 where a weight is kept and 0.0 elsewhere, by parameter; vectors have none
    """

    def __init__(self, method: Reconstruction, block: DecoderBlock, hidden: Tensor, measured: Measurements):
        self.block, self.hidden, self.targets = block, hidden, method.targets(measured)
        self.config, self.ranks, self.share = method.config, method.ranks, measured.share
        self.parameters = method.parameters(block)
        self.masters = Masters(self.parameters)
        self.keep = {p: (self.masters.values[p] != 0).float() for p in linear_parameters(block)}
        # of few samples all are trained on
        self.held_out = ERROR_SAMPLES if self.share.total > 2 * ERROR_SAMPLES else 0
        self.probe = slice(0, self.share.leading(ERROR_SAMPLES))

    def run(self) -> None:
        passes = self.config.passes_of_reconstruction(self.share.total)
        descent = Descent(
            self.masters.values.values(),
            lr=self.config.reconstruct_lr,
            passes=passes,
            share=self.share,
            ranks=self.ranks,
            held_out=self.held_out,
            seed=self.config.seed * 100_003 + self.block.index,
        )
        best, best_error = Snapshot(self.parameters), self._error()
        for _ in range(passes):
            for own in descent.one_pass():
                self._set_gradients(own)
                descent.step()
                self.masters.store()
            error = self._error()
            if error < best_error:
                best, best_error = Snapshot(self.parameters), error
        best.restore()

    def _set_gradients(self, own: Tensor | None) -> None:
        """Gradients of the masters by the summed loss of one step's samples on all ranks; removed weights get none."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        if own is not None:
            device = next(self.block.module.parameters()).device
            with torch.enable_grad(), product_type(device, self.config.reconstruct_compute):
                output = self.block(self.hidden[own])
                loss = output_error(output, self.targets[own], self.config.reconstruct_loss).sum()
                self.block.backward(loss, tokens=output.shape[0] * output.shape[1])
        self.masters.take_gradients(self.ranks, self.keep)

    def _error(self) -> float:
        probe = self.probe
        return block_error(
            self.block, self.hidden[probe], self.targets[probe], self.ranks, kind=self.config.reconstruct_loss
        )
