"""GBLM-Pruner (arXiv:2311.04902): score_ij = |W_ij| * (alpha * G_ij + s_j), G from the full model's language-model loss.

    l2   G = sqrt((1/N) sum_n g_n^2)        l1   G = (1/N) sum_n |g_n|        alpha = config.alpha * sqrt(N)

g_n is the gradient of sample n's mean next-token cross-entropy on the dense model. With l2 and alpha 100, the preset paper's,
this equals the authors' code, whose G is sqrt(sum_n (100 g_n)^2) and whose alpha is 1. Their l1, sum_n |100 g_n|, is this one
with an alpha that is sqrt(N) times as large.
"""

import math
import tempfile

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.errors import WandappError
from wandapp.memory import drop_pages
from wandapp.methods.base import BlockRecord, BlockStore, Method, ScoreTerms
from wandapp.methods.gradient_cache import GradientCache
from wandapp.pattern import SparsityPattern
from wandapp.shards import disk_tensor
from wandapp.statistics import Measurements, weight_gradients


class GBLM(Method):
    """One backward through the whole model per sample, block by block: each block's forward is repeated for its backward.

    Beside the model only one batch's block inputs are in memory; the sums of gradients are memory-mapped files.
    """

    needs = frozenset({"column_norm"})

    def __init__(self, config: PruneConfig, ranks: Ranks):
        super().__init__(config, ranks)
        self._sums: dict[str, Tensor] = {}
        self._read: dict[str, Tensor] = {}  # the same from a cache, whose memory is not ours to give back
        self._note: str | None = None  # for the first block's record

    def prepare(self, store: BlockStore, tokens: Tensor, hidden: Tensor) -> float:
        if self.config.gblm_cache is None:
            return self._accumulate(store, tokens, hidden)
        if self.ranks.size > 1:
            raise WandappError("gblm_cache is for one process, and this job has several; leave it out")
        cache = GradientCache(self.config.gblm_cache, store, tokens, hidden, self.config.gblm_norm)
        with cache.locked():
            found = cache.read()
            if found is None:
                flops = self._accumulate(store, tokens, hidden)
                cache.write(self._sums)
                return flops
        self._read = found
        self._note = f"gblm: the dense model's gradients were read from {cache.path}; this run's time is without them"
        return 0.0

    def _accumulate(self, store: BlockStore, tokens: Tensor, hidden: Tensor) -> float:
        """Sums every sample's gradients; returns the FLOPs."""
        flops = 0.0
        has_experts = any(view.is_expert for linears in store.linears for view in linears.values())
        batch_size = 1 if has_experts else store.batch_size  # experts mix the samples of a batch
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, min(start + batch_size, len(tokens)))
            inputs = [hidden[rows].to(store.device)]
            for index in range(len(store)):
                with store.open_block(index) as block:
                    inputs.append(block(inputs[-1]))
                    flops += block.flops
            gradient = store.loss_gradient(tokens[rows], inputs.pop())
            for index in reversed(range(len(store))):
                with store.open_block(index) as block:
                    gradient = self._backward(block, inputs.pop(), gradient)
                    flops += block.flops
                    for name in block.linears.keys() & self._sums:
                        drop_pages(self._sums[name])  # else all of them end in memory
        self._merge(store)
        return flops

    def _merge(self, store: BlockStore) -> None:
        """Makes the sums those of all ranks' samples."""
        known = set().union(*self.ranks.gather(set(self._sums)))
        for linears in store.linears:
            for view in linears.values():
                if view.name in known:
                    self.ranks.sum_(self._sum(view))

    def _backward(self, block: DecoderBlock, hidden: Tensor, output_gradient: Tensor) -> Tensor:
        """Adds one batch's weight gradients of a block to the sums; returns the gradient of its input."""
        hidden = hidden.detach().requires_grad_(True)
        samples = len(hidden)

        def observe(view: LinearView, x: Tensor, y: Tensor | None) -> None:
            if view.name in block.linears and y is not None:
                rows = x.detach().reshape(1 if view.is_expert else samples, -1, x.shape[-1])
                y.register_hook(lambda grad: self._add(view, rows, grad.reshape(len(rows), -1, grad.shape[-1])))

        with torch.enable_grad():
            output = block.watch(hidden, observe)
            block.backward((output * output_gradient).sum(), tokens=samples * hidden.shape[1])
        assert hidden.grad is not None
        return hidden.grad

    def _sum(self, view: LinearView) -> Tensor:
        """The sum of a map's gradients [out_features, in_features] fp32, in a file; zeros at first."""
        if view.name not in self._sums:
            try:
                self._sums[view.name] = disk_tensor(None, tuple(view.weight.shape), torch.float32)
            except OSError as error:
                raise WandappError(
                    f"gblm: no room for its sums of gradients in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to "
                    "a folder with 4 bytes per weight"
                ) from error
        return self._sums[view.name]

    def _add(self, view: LinearView, x: Tensor, output_gradient: Tensor) -> None:
        total = self._sum(view)
        for gradient in weight_gradients(x, output_gradient):
            total += (gradient.abs_() if self.config.gblm_norm == "l1" else gradient.square_()).to(total.device)

    def apply(self, block: DecoderBlock, measured: Measurements, pattern: SparsityPattern, record: BlockRecord) -> None:
        if self._note:
            record.warnings.append(self._note)
            self._note = None
        super().apply(block, measured, pattern, record)

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        total = self._sums.get(view.name, self._read.get(view.name))
        if total is None:  # an expert that no token of the dense model reached has no gradient
            return ScoreTerms(measured.column_norm(view))
        mean = measured.reordered(view.name, total).to(view.weight.device) / measured.samples
        if view.name in self._sums:
            drop_pages(total)  # else those of every block end in memory
        gradient = mean if self.config.gblm_norm == "l1" else mean.sqrt_()
        return ScoreTerms(measured.column_norm(view), gradient, self.config.alpha * math.sqrt(measured.samples))
