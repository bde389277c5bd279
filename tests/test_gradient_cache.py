"""Kept gradients of gblm: runs that read them give the same bits, and nothing stale is ever read."""

import functools
from pathlib import Path

import pytest
import torch
from tiny import pruned_copy

from wandapp import WandappError

TOKENS = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(1))


pruned = functools.partial(pruned_copy, tokens=TOKENS, method="gblm")


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_that_reads_gradients_gives_the_bits_of_one_that_computes_them(tiny_model, tmp_path, family):
    model, _ = tiny_model(family)
    _, first = pruned(model, sparsity="2:4", gblm_cache=str(tmp_path))
    for options in ({"sparsity": "0.5"}, {"sparsity": "4:8", "alpha": 3.0}):
        without, _ = pruned(model, **options)
        reading, report = pruned(model, **options, gblm_cache=str(tmp_path))
        left, right = without.state_dict(), reading.state_dict()
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert any("were read from" in warning for warning in report.warnings) and report.flops < first.flops
    assert len(entries(tmp_path)) == 1 and not any("were read" in warning for warning in first.warnings)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1.mlp.up_proj", "layers.2.input_layernorm", "lm_head"])
def test_another_weight_anywhere_makes_another_entry(tiny_model, tmp_path, part):
    model, _ = tiny_model("llama")
    pruned(model, gblm_cache=str(tmp_path))
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if part in name).mul_(1.01)
    _, report = pruned(model, gblm_cache=str(tmp_path))
    assert len(entries(tmp_path)) == 2 and not any("were read" in warning for warning in report.warnings)


def test_another_way_to_compute_makes_another_entry(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    pruned(model, gblm_cache=str(tmp_path))
    again, _ = tiny_model("llama", hidden_act="gelu")
    again.load_state_dict(model.state_dict())
    pruned(again, gblm_cache=str(tmp_path))
    assert len(entries(tmp_path)) == 2


def test_how_gradients_are_joined_makes_another_entry(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    for norm in ("l1", "l2"):
        pruned(model, gblm_cache=str(tmp_path), gblm_norm=norm)
    assert len(entries(tmp_path)) == 2


def test_a_damaged_entry_is_refused(tiny_model, tmp_path):
    model, _ = tiny_model("llama")
    pruned(model, gblm_cache=str(tmp_path))
    damaged = sorted(entries(tmp_path)[0].iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(WandappError, match="corrupt or incomplete .* delete"):
        pruned(model, gblm_cache=str(tmp_path))
