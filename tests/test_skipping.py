"""Forwards of pruned blocks that leave out the products with zeros."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wandapp import skipping
from wandapp.blocks import DecoderBlock, RecordedCall, find_linears
from wandapp.evaluate import perplexity
from wandapp.kernels.select import prune_nm_
from wandapp.pipeline import prune
from wandapp.skipping import FEWEST_TOKENS, skipping_zeros

WIDTH = 64


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())


def pruned_block(pattern=(2, 4)):
    torch.manual_seed(0)
    module = Mlp().requires_grad_(False)
    for linear in (module.up, module.down):
        if pattern:
            prune_nm_(linear.weight.data, n=pattern[0], m=pattern[1])
    linears = find_linears(module, "block")
    calls = {size: RecordedCall((), {}, None) for size in (1, 2)}
    return DecoderBlock(0, "block", module, linears, calls, linears)


def weights_of(block):
    return [view.weight for view in block.linears.values()]


def watched(monkeypatch):
    """Shapes of x of every product that skips, as they come."""
    calls: list[torch.Size] = []
    real = skipping.sparse_linear
    monkeypatch.setattr(skipping, "sparse_linear", lambda *args: calls.append(args[0].shape) or real(*args))
    return calls


def test_outputs_and_flops_are_those_of_the_dense_products(monkeypatch):
    block, calls = pruned_block(), watched(monkeypatch)
    hidden = torch.randn(2, FEWEST_TOKENS, WIDTH)
    expected = block(hidden)
    dense_flops, block.flops = block.flops, 0.0
    with skipping_zeros(weights_of(block)):
        torch.testing.assert_close(block(hidden), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 and block.flops == dense_flops
    block(hidden)
    assert len(calls) == 2


@pytest.mark.parametrize("case", ["few tokens", "kept weights", "bfloat16"], ids=lambda case: case.replace(" ", "-"))
def test_everything_else_stays_the_dense_product_bit_for_bit(monkeypatch, case):
    block, calls = pruned_block(None if case == "kept weights" else (2, 4)), watched(monkeypatch)
    hidden = torch.randn(1, FEWEST_TOKENS - 1 if case == "few tokens" else 2 * FEWEST_TOKENS, WIDTH)
    if case == "bfloat16":
        block.module.bfloat16()
        block.linears = block.all_linears = find_linears(block.module, "block")
        hidden = hidden.bfloat16()
    expected = block(hidden)
    flops, block.flops = block.flops, 0.0
    with skipping_zeros(weights_of(block)):
        assert torch.equal(block(hidden), expected)
    assert not calls and block.flops == flops


def test_a_pruning_run_skips_and_ends_at_the_same_masks(tiny_model, monkeypatch):
    model, config = tiny_model("llama")
    dense = copy.deepcopy(model)
    tokens = torch.randint(0, config.vocab_size, (4, FEWEST_TOKENS), generator=torch.Generator().manual_seed(0))
    calls = watched(monkeypatch)
    skipped = prune(model, method="wanda", calibration=tokens)
    assert calls
    monkeypatch.setattr(skipping, "MOST_KEPT", 0.0)
    full = prune(dense, method="wanda", calibration=tokens)
    assert skipped.flops == full.flops
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert ((ours == 0) == (theirs == 0)).float().mean() > 0.999, name


def test_perplexity_of_a_pruned_model_skips_and_stays(tiny_model, monkeypatch, tmp_path):
    model, config = tiny_model("llama")
    tokens = torch.randint(0, config.vocab_size, (3, FEWEST_TOKENS), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "text.safetensors")
    calls = watched(monkeypatch)
    dense = perplexity(model, None, text=tmp_path / "text.safetensors")
    assert not calls
    prune(model, method="magnitude", calibration=tokens)
    calls.clear()
    skipped = perplexity(model, None, text=tmp_path / "text.safetensors")
    blocks, linears = config.num_hidden_layers, 7
    assert len(calls) == len(tokens) * blocks * linears
    monkeypatch.setattr(skipping, "MOST_KEPT", 0.0)
    full = perplexity(model, None, text=tmp_path / "text.safetensors")
    assert skipped.mean_nll == pytest.approx(full.mean_nll, abs=1e-6) and dense.mean_nll != full.mean_nll
