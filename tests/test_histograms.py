"""The report's histograms: counted by hand on a small weight, and on real blocks of every method."""

import math

import pytest
import torch
from torch import nn

import wandapp
from wandapp import histograms
from wandapp.blocks import DecoderBlock, LinearView


def block_of(weight: torch.Tensor) -> DecoderBlock:
    view = LinearView("only", nn.Parameter(weight, requires_grad=False))
    return DecoderBlock(0, "block", nn.Module(), {"only": view}, {}, {"only": view})


def bin_of(value: float, limits: tuple[float, float]) -> int:
    low, high = limits
    return min(max(math.floor((value - low) / (high - low) * histograms.BINS), 0), histograms.BINS - 1)


def test_counts_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.0, 3.0], [4.0, 0.5, -1.0, 2.0]])
    scale, gradient, alpha = torch.tensor([1.0, 2.0, 3.0, 0.1]), torch.full((2, 4), 0.5), 2.0
    block = block_of(weight.clone())
    watched = histograms.BlockHistograms(block)
    watched.score(lambda view: (scale, gradient, alpha))
    kept = torch.tensor([[True, True, False, False], [True, False, False, True]])
    block.linears["only"].parameter.mul_(kept)
    found = watched.close()
    rms = math.sqrt(sum(float(w) ** 2 for w in weight.flatten()) / 8)
    scores = [abs(float(weight[i, j])) * (alpha * 0.5 + float(scale[j])) for i in range(2) for j in range(4)]
    mean = sum(scores) / 8
    expected = {name: [0] * histograms.BINS for name in found}
    for w, score, stays in zip(weight.flatten().tolist(), scores, kept.flatten().tolist(), strict=True):
        expected["weights_before"][bin_of(w / rms, histograms.WEIGHT_RANGE)] += 1
        if stays:
            expected["weights_after"][bin_of(w / rms, histograms.WEIGHT_RANGE)] += 1
        level = math.log10(score / mean) if score else -math.inf
        where = 0 if score == 0 else bin_of(level, histograms.SCORE_RANGE)
        expected["scores_kept" if stays else "scores_removed"][where] += 1
    assert found == expected


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gblm", "rgs", "wanda++", "sparsegpt+ro"])
def test_every_method_records_a_histogram_of_every_block(method, tiny_model):
    model, _ = tiny_model("llama")
    tokens = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    report = wandapp.prune(model, calibration=tokens, method=method, sparsity="2:4", ro_rounds=1, ro_samples=2)
    for block in report.blocks:
        before, after = (sum(block.histograms[f"weights_{when}"]) for when in ("before", "after"))
        assert after == before / 2
        assert sum(block.histograms["scores_removed"]) == sum(block.histograms["scores_kept"]) == after


def test_wanda_removes_the_lower_scores(tiny_model):
    model, _ = tiny_model("llama")
    tokens = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    counts = wandapp.prune(model, calibration=tokens, method="wanda", sparsity="0.5").blocks[0].histograms
    middle = {name: sum(i * n for i, n in enumerate(counts[name])) / sum(counts[name]) for name in counts}
    assert middle["scores_removed"] + 4 < middle["scores_kept"]
