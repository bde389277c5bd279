"""Channel permutation: before an n:m choice, channels of a block change places so that the choice keeps more score.

Only channels that may change places do (`wandapp.folding`), so the dense block computes what it did before, and the result
is an ordinary checkpoint: inference pays nothing. `wandapp.channel_order` has the search.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.channel_order import best_order
from wandapp.distributed import Ranks
from wandapp.folding import Fold, Trace, candidates, expert_fold, holds, proposals, uneven_norms
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements

Score = Callable[[LinearView], Tensor]  # of a map: [out_features, in_features] fp32
Kept = tuple[float, float]  # fraction of the score that the choice keeps, before and after
NO_FOLD = "its input is not made channel by channel by the maps before it, as far as wandapp can tell"


@dataclass
class Permutation:
    """What was done to a block.

    kept      by map that reads permuted channels: the score it keeps
    skipped   by map whose inputs could not be permuted: why
    seconds   tests, search and renaming
    """

    kept: dict[str, Kept] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def permute_channels(
    block: DecoderBlock, hidden: Tensor, measured: Measurements, pattern: SparsityPattern, score: Score, ranks: Ranks
) -> Permutation:
    """Permutes the block's channels in place, and what was measured of it with them. The first rank decides for all.

    hidden   [samples, seq_len, hidden_size], this rank's; the first rank tests on its first sample
    score    the method's score of a map
    """
    start = time.perf_counter()
    renamed, done = ranks.first(lambda: _Search(block, hidden[:1], pattern, score).run())
    for fold, order in renamed:
        if not ranks.is_first:
            fold.apply_(block, order)
        measured.reorder_(fold.consumer, columns=fold.column_index(block, order))
        for name, index in fold.row_indices(block, order).items():
            measured.reorder_(name, rows=index)
    done.seconds = time.perf_counter() - start
    return done


class _Search:
    """Finds folds, searches an order for each, renames, tests, and undoes what does not hold."""

    def __init__(self, block: DecoderBlock, sample: Tensor, pattern: SparsityPattern, score: Score):
        self.block, self.sample, self.pattern, self.score = block, sample, pattern, score
        self.renamed: list[tuple[Fold, Tensor]] = []
        self.done = Permutation()

    def run(self) -> tuple[list[tuple[Fold, Tensor]], Permutation]:
        linears = self.block.linears
        with uneven_norms(self.block):
            trace = Trace(self.block, self.sample)
            found = candidates(self.block, trace, self.sample.shape[-1])
            for parameter in dict.fromkeys(linears[name].parameter for name in found):
                trace = self._permute([name for name, view in linears.items() if view.parameter is parameter], trace)
        return self.renamed, self.done

    def _permute(self, consumers: list[str], trace: Trace) -> Trace:
        """Permutes the inputs of maps that are stored together; the trace of the block as it is then."""
        folds = self._folds(consumers, trace)
        misfit = next((fold for fold in folds if fold.channels % self.pattern.m), None)
        if misfit:
            reason = f"sets of {misfit.channels} channels do not divide into groups of {self.pattern.m}"
            return self._skip(consumers, reason, trace)
        if not folds:
            return self._skip(consumers, NO_FOLD, trace)
        found = [self._best_order(fold) for fold in folds]
        orders = [order for order, _ in found]
        after = self._renamed(folds, orders, trace)
        if after is None:
            return self._skip(consumers, NO_FOLD, trace)
        self.renamed += zip(folds, orders, strict=True)
        self.done.kept |= {fold.consumer: kept for fold, (_, kept) in zip(folds, found, strict=True)}
        return after

    def _folds(self, consumers: list[str], trace: Trace) -> list[Fold]:
        """A fold of each consumer, the first layout that holds; where just one is possible, renaming will test it."""
        layouts = list(
            zip(*(proposals(self.block, trace, name) for name in consumers if name in trace.inputs), strict=False)
        )
        if len(layouts) > 1:
            layouts = [folds for folds in layouts if self._holds(list(folds), trace)]
        if not layouts:
            return []
        known = {fold.consumer: fold for fold in layouts[0]}
        return [known.get(name) or expert_fold(layouts[0][0], name) for name in consumers]

    def _holds(self, folds: list[Fold], trace: Trace) -> bool:
        """Whether channels may change places so; the weights come back as they were."""
        orders = [fold.reversed_order() for fold in folds]
        held = self._renamed(folds, orders, trace) is not None
        if held:
            self._undo(folds, orders)
        return held

    def _renamed(self, folds: list[Fold], orders: list[Tensor], before: Trace) -> Trace | None:
        """The trace of the block with its channels renamed; or None, and the weights as they were, if they must not be."""
        for fold, order in zip(folds, orders, strict=True):
            fold.apply_(self.block, order)
        after = Trace(self.block, self.sample)
        if holds(self.block, folds, orders, before, after):
            return after
        self._undo(folds, orders)
        return None

    def _undo(self, folds: list[Fold], orders: list[Tensor]) -> None:
        for fold, order in zip(folds, orders, strict=True):
            fold.apply_(self.block, order.argsort(dim=1))

    def _skip(self, consumers: list[str], reason: str, trace: Trace) -> Trace:
        self.done.skipped |= dict.fromkeys(consumers, reason)
        return trace

    def _best_order(self, fold: Fold) -> tuple[Tensor, Kept]:
        """(order [sets, channels], score kept) of one map's inputs."""
        score = self.score(self.block.linears[fold.consumer])
        n, m = self.pattern.n_and_m
        found = [
            best_order(score[:, columns].permute(1, 2, 0).flatten(1), n=n, m=m)
            for columns in fold.columns.to(score.device)
        ]
        total = max(sum(one.total for one in found), 1e-30)
        kept = sum(one.kept_before for one in found) / total, sum(one.kept for one in found) / total
        return torch.stack([one.channels for one in found]), kept
