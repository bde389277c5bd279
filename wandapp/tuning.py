"""End-to-end tuning: when all blocks are pruned, a few numbers learn to give the dense model's next-token distribution.

    minimise over g, norm weights, biases    sum_n sum_t KL( p_dense(. | x_n, <= t) || p_pruned(. | x_n, <= t) )
    W <- diag(g) W        b <- diag(g) b     for every pruned map W [out_features, in_features]

Zeros stay zeros, and inference pays nothing. Rescaling by learnt vectors is that of IA3 (arXiv:2205.05638), training norm weights
after compression that of norm tweaking (arXiv:2309.02784); here both at once, and with the dense model as the teacher, whose
last states reconstruction along the dense path has already. Final norm and output head stay, so that both models share them.

Forwards and backwards go block by block, so that the activations of one block, and the inputs of all, are in memory.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.config import PruneConfig
from wandapp.descent import Descent, product_type
from wandapp.distributed import Ranks
from wandapp.methods.base import ERROR_SAMPLES
from wandapp.methods.refiner import LossScale, Masters, block_generator
from wandapp.shards import ShardReader, shard_metadata, write_shard
from wandapp.store import ModelStore

MOST_GAIN = 2.0  # a row is scaled by no more than this, and by no less than its inverse


@dataclass
class Tuned:
    """What was learnt.

    divergence_before, divergence_after   nats per token, KL of the dense model's distribution from the pruned one's, on samples
                                          that were not trained on where there are more than eight
    gains     fp32 factors [out_features] of the rows of pruned maps, by map
    vectors   values of the blocks' norm weights and biases, before gains, by parameter
    flops     spent on it by this rank
    left_out  steps whose gradients were not finite
    """

    divergence_before: float
    divergence_after: float
    gains: dict[str, Tensor]
    vectors: dict[str, Tensor]
    flops: float = 0.0
    left_out: int = 0

    @property
    def is_better(self) -> bool:
        return self.divergence_after < self.divergence_before

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"gain {name}": gain for name, gain in self.gains.items()}
        tensors |= {f"vector {name}": vector for name, vector in self.vectors.items()}
        divergences = {"before": repr(self.divergence_before), "after": repr(self.divergence_after)}
        write_shard(path, tensors, divergences)

    @classmethod
    def read(cls, path: Path) -> "Tuned":
        """What `write` wrote."""
        reader, divergences = ShardReader([path]), shard_metadata(path)
        kinds: dict[str, dict[str, Tensor]] = {"gain": {}, "vector": {}}
        for key in reader.tensors:
            kind, _, name = key.partition(" ")
            kinds[kind][name] = reader.read(key)
        return cls(float(divergences["before"]), float(divergences["after"]), kinds["gain"], kinds["vector"])

    def apply(self, block: DecoderBlock) -> None:
        """Writes into the block what was learnt of it."""
        for name, parameter in vectors_of(block).items():
            parameter.data.copy_(self.vectors[name])
        for view in block.linears.values():
            if view.name in self.gains:
                gain = self.gains[view.name].to(view.weight.device)
                scaled = (view.weight.float() * gain.unsqueeze(1)).to(view.weight.dtype)
                # What is kept stays so, even if it underflows.
                view.weight.copy_(torch.where(scaled == 0, view.weight, scaled))
                bias = _bias(block, view)
                if bias is not None:
                    bias.data.copy_(bias.data.float() * gain)


def tune(store: ModelStore, tokens: Tensor, hidden: Tensor, dense: Tensor, config: PruneConfig, ranks: Ranks) -> Tuned:
    """Trains on this rank's samples; the store's blocks, all pruned, are as they were when it returns.

    tokens   [samples, seq_len]
    hidden   [samples, seq_len, hidden_size] the first block's inputs
    dense    of the same shape: the last block's outputs in the dense model
    """
    with store.whole_model(), ExitStack() as stack:
        blocks = [stack.enter_context(store.open_block(index)) for index in range(len(store))]
        return _Tuning(store, blocks, tokens, hidden, dense, config, ranks).run()


class _Tuning:
    """All passes, of which the best is kept. The vectors of the blocks are trained in place and put back in the end."""

    def __init__(
        self,
        store: ModelStore,
        blocks: Sequence[DecoderBlock],
        tokens: Tensor,
        hidden: Tensor,
        dense: Tensor,
        config: PruneConfig,
        ranks: Ranks,
    ):
        self.store, self.blocks, self.config, self.ranks = store, blocks, config, ranks
        self.tokens, self.hidden, self.dense = tokens, hidden, dense
        self.share = ranks.share(len(tokens))
        self.held_out = ERROR_SAMPLES if self.share.total > 2 * ERROR_SAMPLES else 0
        self.named = {name: parameter for block in blocks for name, parameter in vectors_of(block).items()}
        self.vectors = Masters(list(self.named.values()))
        self.gains = {
            view.name: torch.ones(len(view.weight), device=store.device)
            for block in blocks
            for view in block.linears.values()
            if _scales(block, view)
        }
        self.loss_scale = LossScale(self.named.values())
        self.flops = 0.0

    def run(self) -> Tuned:
        """Whatever stops it, the blocks are as they were."""
        initial = {parameter: parameter.data.clone() for parameter in self.named.values()}
        try:
            best = self._best()
            return replace(best, flops=self.flops, left_out=self.loss_scale.left_out)
        finally:
            for parameter, value in initial.items():
                parameter.data.copy_(value)
                parameter.grad = None

    def _best(self) -> Tuned:
        before = self._divergence()
        best = self._learnt(before, before)
        passes = self.config.tune_passes or 0
        descent = Descent(
            [*self.vectors.values.values(), *self.gains.values()],
            lr=self.config.tune_lr,
            passes=passes,
            share=self.share,
            ranks=self.ranks,
            held_out=self.held_out,
            generator=block_generator(self.config.seed, len(self.blocks)),
        )
        for _ in range(passes):
            for own in descent.one_pass():
                self._set_gradients(own)
                descent.step()
                self.vectors.store()
                for gain in self.gains.values():
                    gain.clamp_(1 / MOST_GAIN, MOST_GAIN)
            best = min(best, self._learnt(before, self._divergence()), key=lambda learnt: learnt.divergence_after)
        return best

    def _learnt(self, before: float, now: float) -> Tuned:
        gains = {name: gain.clone() for name, gain in self.gains.items()}
        return Tuned(before, now, gains, {name: self.vectors.values[p].clone() for name, p in self.named.items()})

    def _set_gradients(self, own: Tensor | None) -> None:
        """Gradients of vectors and gains by one step's samples on all ranks."""
        self.loss_scale.run(lambda scale: self._gradients(own, scale))

    def _gradients(self, own: Tensor | None, scale: float) -> list[Tensor]:
        for trained in (*self.named.values(), *self.gains.values()):
            trained.requires_grad_(True)
        if own is not None:
            with torch.enable_grad(), product_type(self.store.device, self.config.reconstruct_compute):
                self._backward(own, scale)
        found = self.vectors.take_gradients(self.ranks, {}, scale)
        for gain in self.gains.values():
            gradient = self.ranks.sum_(torch.zeros_like(gain) if gain.grad is None else gain.grad)
            gain.grad = gradient.div_(scale)
            gain.requires_grad_(False)
            found.append(gradient)
        return found

    def _backward(self, own: Tensor, scale: float) -> None:
        """Every block's forward is repeated for its backward, so that only its inputs are kept."""
        inputs = [self.hidden[own].to(self.store.device)]
        for block in self.blocks:
            with torch.no_grad():
                inputs.append(self._forward(block, inputs[-1]))
        state = inputs.pop().requires_grad_(True)
        (scale * self.store.divergence(self.tokens[own], state, self.dense[own])).backward()
        gradient = state.grad
        for block in reversed(self.blocks):
            state = inputs.pop().detach().requires_grad_(True)
            output = self._forward(block, state)
            (output.float() * gradient).sum().backward()
            gradient = state.grad.float()
            self.flops += output.shape[0] * output.shape[1] * block.forward_flops_per_token

    def _forward(self, block: DecoderBlock, hidden: Tensor) -> Tensor:
        """The block with its maps' rows scaled."""

        def scale(view: LinearView, x: Tensor, y: Tensor | None) -> Tensor | None:
            gain = self.gains.get(view.name)
            return None if gain is None or y is None else (y * gain).to(y.dtype)

        self.flops += hidden.shape[0] * hidden.shape[1] * block.forward_flops_per_token
        output = block.watch(hidden, scale)
        assert output is not None  # it ran to its end
        return output

    @torch.no_grad()
    def _divergence(self) -> float:
        """Mean over the tokens of the leading samples."""
        total = torch.zeros(2, dtype=torch.float64, device=self.store.device)
        for row in range(self.share.leading(ERROR_SAMPLES)):
            rows = slice(row, row + 1)
            state = self.hidden[rows].to(self.store.device)
            for block in self.blocks:
                state = self._forward(block, state)
            divergence = self.store.divergence(self.tokens[rows], state, self.dense[rows])
            total += torch.tensor([divergence.item(), self.tokens[rows].numel()], device=total.device)
        divergence, tokens = self.ranks.sum_(total).tolist()
        return divergence / tokens


def vectors_of(block: DecoderBlock) -> dict[str, nn.Parameter]:
    """The block's norm weights and biases by dotted name."""
    return {f"{block.name}.{name}": p for name, p in block.module.named_parameters() if p.dim() == 1}


def _bias(block: DecoderBlock, view: LinearView) -> nn.Parameter | None:
    """What the map adds to its product."""
    if view.is_expert:
        return None
    return getattr(block.module.get_submodule(view.name.removeprefix(f"{block.name}.")), "bias", None)


def _scales(block: DecoderBlock, view: LinearView) -> bool:
    """Whether the product that is seen is the map's whole output, bias included, so that one gain serves both."""
    if view.is_expert or _bias(block, view) is None:
        return True
    kind = type(block.module.get_submodule(view.name.removeprefix(f"{block.name}.")))
    return kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D"
