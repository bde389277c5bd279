"""What a method may know about a block's linear maps, all gathered in one pass of the dense block.

    column_norm         s_j = sqrt((1/N) sum_n sum_t X_n[t,j]^2)                          Wanda, arXiv:2306.11695
    hessian             H = (2/N) sum_n X_n^T X_n                                         SparseGPT, arXiv:2301.00774
    regional_gradient   G = sqrt((1/N) sum_n (d ||f(X_n)||_F / dW)^2)                     Wanda++, arXiv:2503.04992

Linear maps fed by one tensor (q, k and v; gate and up) share its statistics, which are computed once.
Where several ranks share the samples, each measures its own; the sums over all of them come back on every rank.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.distributed import Ranks, Share
from wandapp.kernels.column_sumsq import column_sumsq

PROBE_TOKENS = 128  # tokens of the first sample on which layer errors are measured


class ColumnNorm:
    """Norm of each input feature, kept per sample so that any subset of the samples can be asked for.

    sumsq   [samples, in_features] fp32, sum over a sample's tokens of x^2; samples of all ranks
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

    def merge_(self, ranks: Ranks, rows: slice) -> None:
        """Fills in the samples of other ranks; this one's are `rows`. Exact: every sum has one term that is not zero."""
        self.sumsq[: rows.start] = 0.0
        self.sumsq[rows.stop :] = 0.0
        ranks.sum_(self.sumsq)


class Hessian:
    """Second-order statistic of one input: value [in_features, in_features] fp32, (2/N) sum_n X_n^T X_n."""

    def __init__(self, samples: int, in_features: int, device: torch.device):
        self.samples = samples
        self.value = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor, rows: slice) -> None:
        x = x.flatten(0, -2).float()  # [tokens, in_features]
        torch.addmm(self.value, x.T, x, alpha=2.0 / self.samples, out=self.value)

    def merge_(self, ranks: Ranks, rows: slice) -> None:
        ranks.sum_(self.value)


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

    def merge_(self, ranks: Ranks, rows: slice) -> None:
        ranks.sum_(self.sumsq)


def weight_gradients(x: Tensor, output_gradient: Tensor) -> Iterator[Tensor]:
    """Each sample's weight gradient dy_n^T x_n, [out, in] fp32; x [samples, tokens, in], output_gradient [.., out].

    In fp32 all come in one tensor, which the next one overwrites: no second gradient is ever in memory.
    """
    gradient = x.new_empty(output_gradient.shape[-1], x.shape[-1])
    for sample_x, sample_gradient in zip(x, output_gradient, strict=True):
        yield torch.mm(sample_gradient.T, sample_x, out=gradient).float()


@dataclass
class Measurements:
    """One dense pass over a block. outputs and probes are of this rank's samples, all else of every rank's.

    share       where this rank's samples lie among all
    outputs     [kept, seq_len, hidden_size] dense outputs of the leading samples
    tokens      calibration tokens that reached each linear map
    leader      the linear map whose statistics each one shares: an earlier one fed by the same tensor, or itself
    dense_path  [samples, seq_len, hidden_size] what the dense model gives here on its own inputs, where a method follows it
    probes      up to PROBE_TOKENS input rows [tokens, in_features] of each linear map, for layer errors
    orders      since then, by linear map: for each output and for each input feature, which one came to its place
    """

    share: Share
    outputs: Tensor
    tokens: dict[str, int] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    norms: dict[str, ColumnNorm] = field(default_factory=dict)
    hessians: dict[str, Hessian] = field(default_factory=dict)
    gradients: dict[str, RegionalGradient] = field(default_factory=dict)
    probes: dict[str, Tensor] = field(default_factory=dict)
    drawn: Tensor | None = None
    orders: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    dense_path: Tensor | None = None

    @property
    def samples(self) -> int:
        """Samples of all ranks."""
        return self.share.total

    def add_statistics(self, view: LinearView, leader: str, needs: frozenset[str]) -> None:
        """Gives a linear map empty statistics, or its leader's; those it has already stay."""
        self.leader[view.name] = leader
        shape = self.samples, view.weight.shape[1], view.weight.device
        kinds: tuple[tuple[str, dict[str, Any], Callable[..., Any]], ...] = (
            ("column_norm", self.norms, ColumnNorm),
            ("hessian", self.hessians, Hessian),
        )
        for need, statistics, create in kinds:
            if need in needs and view.name not in statistics:
                statistics[view.name] = create(*shape) if leader == view.name else statistics[leader]
        if "regional_gradient" in needs and view.name not in self.gradients:
            self.gradients[view.name] = RegionalGradient(self.samples, view)

    def merge_(self, ranks: Ranks, linears: dict[str, LinearView], needs: frozenset[str]) -> None:
        """Makes every statistic that of all ranks. An expert that only other ranks' samples reached starts from nothing."""
        tokens, leaders = zip(*ranks.gather((self.tokens, self.leader)), strict=True)
        self.tokens = dict(sum(map(Counter, tokens), Counter()))
        merged: dict[str, str] = {}
        for found in leaders:
            merged = merged | {name: leader for name, leader in found.items() if name not in merged}
        for name, leader in merged.items():
            self.add_statistics(linears[name], leader, needs)
        held = (kind[name] for kind in (self.norms, self.hessians, self.gradients) for name in merged if name in kind)
        for statistic in dict.fromkeys(held):  # each once, in the same order on every rank
            statistic.merge_(ranks, self.share.rows)

    def reorder_(self, name: str, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Follows the linear map whose output features (rows) or input features (columns), its own alone, change places.

        rows, columns   [features], by place the feature that comes there; for each map and axis once
        """
        earlier = self.orders.get(name, (None, None))
        self.orders[name] = earlier[0] if rows is None else rows, earlier[1] if columns is None else columns
        if name in self.gradients:
            gradient = self.gradients[name]
            gradient.sumsq = _reordered(gradient.sumsq, rows, columns)
        if columns is None or self.leader.get(name) is None:  # an expert that no token reached has no more
            return
        if name in self.norms:
            self.norms[name].sumsq = _reordered(self.norms[name].sumsq, None, columns)
        if name in self.hessians:
            self.hessians[name].value = _reordered(self.hessians[name].value, columns, columns)
        if name in self.probes:
            self.probes[name] = _reordered(self.probes[name], None, columns)

    def reordered(self, name: str, dense: Tensor) -> Tensor:
        """A matrix of the map's shape that was made before the measurements, as the map's features stand now."""
        return _reordered(dense, *self.orders.get(name, (None, None)))

    def among(self, drawn: Tensor | None) -> "Measurements":
        """The same measurements with input norms over the drawn samples (indices) only; None means all."""
        return replace(self, drawn=drawn)

    def column_norm(self, view: LinearView) -> Tensor:
        """s_j [in_features] fp32 of the map's input: over all samples, too, where no drawn one reached an expert."""
        norm = self.norms[view.name]
        value = norm.value(self.drawn)
        return norm.value() if view.is_expert and self.drawn is not None and not value.any() else value


def _reordered(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if rows is not None:
        matrix = matrix[rows.to(matrix.device)]
    return matrix if columns is None else matrix[:, columns.to(matrix.device)]


class Collector:
    """Observer of `DecoderBlock.watch` that fills Measurements."""

    def __init__(self, block: DecoderBlock, measured: Measurements, needs: frozenset[str]):
        self.block, self.measured, self.needs = block, measured, needs
        self.rows = slice(0, 0)
        self.inputs: list[tuple[Tensor, str]] = []

    def start(self, rows: slice) -> None:
        """Announces the samples of the next forward, by their place among this rank's."""
        start = self.measured.share.start
        self.rows, self.inputs = slice(start + rows.start, start + rows.stop), []

    def __call__(self, view: LinearView, x: Tensor, y: Tensor | None) -> None:
        if view.name not in self.block.linears:
            return
        measured, by_sample = self.measured, self._by_sample(view, x.detach())
        if view.name not in measured.tokens:
            measured.probes[view.name] = by_sample[0, :PROBE_TOKENS].clone()
            measured.add_statistics(view, self._leader(view, x), self.needs)
        measured.tokens[view.name] = measured.tokens.get(view.name, 0) + x.numel() // x.shape[-1]
        if view.name in measured.gradients:
            gradient = measured.gradients[view.name]
            y.register_hook(lambda grad: gradient.update(by_sample, grad.reshape(len(by_sample), -1, grad.shape[-1])))
        if measured.leader[view.name] == view.name:
            for statistics in (measured.norms, measured.hessians):
                if view.name in statistics:
                    statistics[view.name].update(by_sample, self.rows)
            if view.name in measured.hessians:
                self.block.flops += 2.0 * x.numel() * x.shape[-1]

    def _by_sample(self, view: LinearView, x: Tensor) -> Tensor:
        """[samples, tokens, in_features]; an expert's tokens, which mix samples, count for the first one."""
        return x.reshape(1 if view.is_expert else self.rows.stop - self.rows.start, -1, x.shape[-1])

    def _leader(self, view: LinearView, x: Tensor) -> str:
        """The linear map whose statistics `view` shares: an earlier one fed by this very tensor, or itself."""
        for earlier, name in self.inputs:
            if earlier is x and self.measured.leader[name] == name:
                return name
        self.inputs.append((x, view.name))
        return view.name


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
    block: DecoderBlock,
    hidden: Tensor,
    needs: frozenset[str],
    ranks: Ranks,
    *,
    outputs: int | None = None,
    loss: str | None = "frobenius",
) -> Measurements:
    """Statistics `needs` of every linear map over the samples of all ranks, in one pass of the block.

    hidden    [samples, seq_len, hidden_size], this rank's samples
    outputs   of how many leading samples, of all, to keep the dense outputs (None: all); beyond them a forward ends at the
              last input that is read
    loss      kind of `regional_loss`, where the regional gradient is needed
    """
    with_gradient = "regional_gradient" in needs
    share = ranks.share(len(hidden))
    kept = len(hidden) if outputs is None else share.leading(outputs)
    measured = Measurements(share, hidden.new_empty(kept, *hidden.shape[1:]))
    collector = Collector(block, measured, needs)
    batch_size = 1 if block.has_experts else None  # experts mix the samples of a batch
    for rows in block.batches(len(hidden), batch_size):
        if not needs and rows.start >= max(kept, 1):
            break
        collector.start(rows)
        stop = rows.start >= kept and not with_gradient
        with torch.set_grad_enabled(with_gradient):
            output = block.watch(hidden[rows], collector, stop=stop, leaves=with_gradient)
            if with_gradient:
                assert output is not None and loss is not None
                block.backward(regional_loss(output, loss), tokens=output.shape[0] * output.shape[1])
        if rows.start < kept:
            measured.outputs[rows] = output.detach()[: kept - rows.start]
    measured.merge_(ranks, block.linears, needs)
    return measured
