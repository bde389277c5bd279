"""What a method may know about a block's linear maps, all gathered in one pass of the dense block.

    column_norm         s_j = sqrt((1/N) sum_n sum_t X_n[t,j]^2)                          Wanda, arXiv:2306.11695
    hessian             H = (2/N) sum_n X_n^T X_n                                         SparseGPT, arXiv:2301.00774
    regional_gradient   G = sqrt((1/N) sum_n (d ||f(X_n)||_F / dW)^2)                     Wanda++, arXiv:2503.04992

Linear maps fed by one tensor (q, k and v; gate and up) share its statistics, which are computed once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.kernels.column_sumsq import column_sumsq

PROBE_TOKENS = 128  # tokens of the first sample on which layer errors are measured


class ColumnNorm:
    """Norm of each input feature, kept per sample so that any subset of the samples can be asked for.

    sumsq   [samples, in_features] fp32, sum over a sample's tokens of x^2
    """

    def __init__(self, samples: int, in_features: int, device: torch.device):
        self.sumsq = torch.zeros(samples, in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor, rows: slice) -> None:
        """Sets the sums of samples `rows` from their inputs x [samples, tokens, in_features]."""
        self.sumsq[rows.start : rows.start + len(x)] = column_sumsq(x)

    def value(self, samples: Tensor | None = None) -> Tensor:
        """s_j [in_features] fp32 over all samples, or over the given sample indices."""
        sumsq = self.sumsq if samples is None else self.sumsq[samples]
        return sumsq.sum(dim=0).div_(len(sumsq)).sqrt_()


class Hessian:
    """Second-order statistic of one input: value [in_features, in_features] fp32, (2/N) sum_n X_n^T X_n."""

    def __init__(self, samples: int, in_features: int, device: torch.device):
        self.samples = samples
        self.value = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor, rows: slice) -> None:
        x = x.flatten(0, -2).float()  # [tokens, in_features]
        torch.addmm(self.value, x.T, x, alpha=2.0 / self.samples, out=self.value)


class RegionalGradient:
    """Sum over samples of the squared gradient of one weight; one sample's gradient is the only other copy.

    sumsq   [out_features, in_features] fp32
    """

    def __init__(self, samples: int, view: LinearView):
        self.samples = samples
        self.sumsq = torch.zeros(view.weight.shape, dtype=torch.float32, device=view.weight.device)

    def update(self, x: Tensor, output_gradient: Tensor) -> None:
        """Adds (dy_n^T x_n)^2 for each sample; x [samples, tokens, in], output_gradient [samples, tokens, out]."""
        for gradient in weight_gradients(x, output_gradient):
            self.sumsq.addcmul_(gradient, gradient)

    def value(self) -> Tensor:
        """G [out_features, in_features] fp32: root mean square over samples."""
        return (self.sumsq / self.samples).sqrt_()


def weight_gradients(x: Tensor, output_gradient: Tensor) -> Iterator[Tensor]:
    """Each sample's weight gradient dy_n^T x_n, [out, in] fp32; x [samples, tokens, in], output_gradient [.., out]."""
    for sample_x, sample_gradient in zip(x, output_gradient, strict=True):
        yield (sample_gradient.T @ sample_x).float()


@dataclass
class Measurements:
    """One dense pass over a block.

    tokens      calibration tokens that reached each linear map
    outputs     [kept, seq_len, hidden_size] dense outputs of the leading samples, or None
    probes      up to PROBE_TOKENS input rows [tokens, in_features] of each linear map, for layer errors
    """

    samples: int
    tokens: dict[str, int] = field(default_factory=dict)
    norms: dict[str, ColumnNorm] = field(default_factory=dict)
    hessians: dict[str, Hessian] = field(default_factory=dict)
    gradients: dict[str, RegionalGradient] = field(default_factory=dict)
    outputs: Tensor | None = None
    probes: dict[str, Tensor] = field(default_factory=dict)
    drawn: Tensor | None = None

    def among(self, drawn: Tensor | None) -> "Measurements":
        """The same measurements with input norms over the drawn samples (indices) only; None means all."""
        return replace(self, drawn=drawn)

    def column_norm(self, view: LinearView) -> Tensor:
        """s_j [in_features] fp32 of the map's input."""
        return self.norms[view.name].value(self.drawn)


class Collector:
    """Observer of `DecoderBlock.watch` that fills Measurements."""

    def __init__(self, block: DecoderBlock, samples: int, needs: frozenset[str]):
        self.block, self.needs = block, needs
        self.measured = Measurements(samples)
        self.rows = slice(0, 0)
        self.leader: dict[str, str] = {}
        self.inputs: list[tuple[Tensor, str]] = []

    def start(self, rows: slice) -> None:
        """Announces the samples of the next forward."""
        self.rows, self.inputs = rows, []

    def __call__(self, view: LinearView, x: Tensor, y: Tensor | None) -> None:
        if view.name not in self.block.linears:
            return
        measured, first = self.measured, view.name not in self.measured.tokens
        by_sample = self._by_sample(view, x.detach())
        measured.tokens[view.name] = measured.tokens.get(view.name, 0) + x.numel() // x.shape[-1]
        if first:
            measured.probes[view.name] = by_sample[0, :PROBE_TOKENS].clone()
        if "regional_gradient" in self.needs:
            self._watch_gradient(view, by_sample, y)
        if first:
            self.leader[view.name] = self._share(view, x)
        if self.leader[view.name] == view.name:
            for statistics in (measured.norms, measured.hessians):
                if view.name in statistics:
                    statistics[view.name].update(by_sample, self.rows)
            if view.name in measured.hessians:
                self.block.flops += 2.0 * x.numel() * x.shape[-1]

    def _by_sample(self, view: LinearView, x: Tensor) -> Tensor:
        """[samples, tokens, in_features]; an expert's tokens, which mix samples, count for the first one."""
        return x.reshape(1 if view.is_expert else self.rows.stop - self.rows.start, -1, x.shape[-1])

    def _share(self, view: LinearView, x: Tensor) -> str:
        """The linear map whose statistics `view` shares: an earlier one fed by this very tensor, or itself."""
        measured = self.measured
        for earlier, name in self.inputs:
            if earlier is x and self.leader[name] == name:
                for statistics in (measured.norms, measured.hessians):
                    if name in statistics:
                        statistics[view.name] = statistics[name]
                return name
        self.inputs.append((x, view.name))
        shape = measured.samples, x.shape[-1], x.device
        if "column_norm" in self.needs:
            measured.norms[view.name] = ColumnNorm(*shape)
        if "hessian" in self.needs:
            measured.hessians[view.name] = Hessian(*shape)
        return view.name

    def _watch_gradient(self, view: LinearView, x: Tensor, y: Tensor) -> None:
        gradient = self.measured.gradients.get(view.name)
        if gradient is None:
            gradient = self.measured.gradients[view.name] = RegionalGradient(self.measured.samples, view)
        y.register_hook(lambda grad: gradient.update(x, grad.reshape(len(x), -1, grad.shape[-1])))


def regional_loss(output: Tensor, kind: str) -> Tensor:
    """||f(X_n)||_F summed over the batch; its gradient by a sample's weights is that sample's own.

    output  [samples, seq_len, hidden_size] of the dense block
    kind    "frobenius": as published. "token": each token divided by its RMS (held constant), as the next block's norm
            will see it, so that a few massive activations do not decide alone
    """
    output = output.float()
    if kind == "token":
        output = output / token_rms(output.detach())
    return output.flatten(1).norm(dim=1).sum()


def token_rms(hidden: Tensor) -> Tensor:
    """Root mean square [..., 1] of each token's state in hidden [..., hidden_size], fp32."""
    return hidden.float().square().mean(dim=-1, keepdim=True).sqrt_().clamp_min_(1e-12)


def measure(
    block: DecoderBlock, hidden: Tensor, needs: frozenset[str], *, outputs: int = 0, loss: str = "frobenius"
) -> Measurements:
    """Statistics `needs` of every linear map over hidden [samples, seq_len, hidden_size], in one pass of the block.

    outputs   how many leading samples' dense outputs to keep; beyond them a forward ends at the last input that is read
    loss      kind of `regional_loss`, where the regional gradient is needed
    """
    with_gradient = "regional_gradient" in needs
    collector = Collector(block, len(hidden), needs)
    batch_size = 1 if block.has_experts else None  # experts mix the samples of a batch
    for rows in block.batches(len(hidden), batch_size):
        if not needs and rows.start >= max(outputs, 1):
            break
        collector.start(rows)
        stop = rows.start >= outputs and not with_gradient
        with torch.set_grad_enabled(with_gradient):
            output = block.watch(hidden[rows], collector, stop=stop, leaves=with_gradient)
            if with_gradient:
                block.backward(regional_loss(output, loss), tokens=output.shape[0] * output.shape[1])
        if rows.start < outputs:
            _keep_outputs(collector.measured, output.detach(), rows, outputs)
    return collector.measured


def _keep_outputs(measured: Measurements, output: Tensor, rows: slice, outputs: int) -> None:
    if measured.outputs is None:
        measured.outputs = output.new_empty(outputs, *output.shape[1:])
    kept = measured.outputs[rows.start : rows.stop]
    kept.copy_(output[: len(kept)])
