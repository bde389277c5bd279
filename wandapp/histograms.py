"""Compact histograms of a block's weights and scores, before and after pruning, for the report.

They come from a few evenly spaced rows of every linear map, so they cost a thousandth of a forward: what the report
draws, no statistic that a method may use. Each map is in its own units, so that all maps of a block add up in one histogram.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView

VALUES = 16384  # of each linear map, in whole rows: 28 rows of 576 inputs, 4 of 4096
WEIGHT_RANGE = (-4.0, 4.0)  # in units of the sampled rows' root mean square; what lies outside counts in the outer bin
SCORE_RANGE = (-3.0, 1.5)  # log10 of a score over the sampled rows' mean score
BINS = 40

ColumnTerms = Callable[[LinearView], tuple[Tensor | None, Tensor | None, float]]  # column_scale, gradient, alpha


class BlockHistograms:
    """Counts by bin: "weights_before" and "weights_after" (non-zeros only), "scores_removed" and "scores_kept".

    Made before the block is pruned; `score` as soon as the method's terms are known; `close` at the end.
    """

    def __init__(self, block: DecoderBlock):
        self.block = block
        self.dense = {name: _rows(view.weight) for name, view in block.linears.items()}
        self.scores: dict[str, Tensor] = {}

    def score(self, terms: ColumnTerms) -> None:
        """Scores |W_ij| * (alpha * G_ij + s_j) of the dense weights, by the method's terms of each map."""
        for name, view in self.block.linears.items():
            column_scale, gradient, alpha = terms(view)
            scale = torch.ones(()) if column_scale is None else column_scale.float().cpu()
            if gradient is not None:
                scale = alpha * _rows(gradient) + scale
            self.scores[name] = self.dense[name].abs() * scale

    def close(self) -> dict[str, list[int]]:
        """The counts, by the weights that the block has now."""
        names = ("weights_before", "weights_after", "scores_removed", "scores_kept")
        counts = {name: torch.zeros(BINS, dtype=torch.int64) for name in names}
        for name, view in self.block.linears.items():
            dense, pruned, score = self.dense[name], _rows(view.weight), self.scores[name]
            unit, kept = dense.square().mean().sqrt().clamp_min(1e-30), pruned != 0
            level = (score / score.mean().clamp_min(1e-30)).clamp_min(1e-30).log10()
            counts["weights_before"] += _count(dense / unit, WEIGHT_RANGE)
            counts["weights_after"] += _count(pruned[kept] / unit, WEIGHT_RANGE)
            counts["scores_removed"] += _count(level[~kept], SCORE_RANGE)
            counts["scores_kept"] += _count(level[kept], SCORE_RANGE)
        return {name: count.tolist() for name, count in counts.items()}


def _rows(matrix: Tensor) -> Tensor:
    """[rows, columns] fp32 on the CPU, a copy of evenly spaced rows of some VALUES values."""
    rows = max(1, VALUES // matrix.shape[1])
    step = max(1, matrix.shape[0] // rows)
    return matrix[::step][:rows].to("cpu", torch.float32, copy=True)


def _count(values: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    position = ((values - low) * (BINS / (high - low))).floor().clamp(0, BINS - 1)
    return torch.bincount(position.long().flatten(), minlength=BINS)
