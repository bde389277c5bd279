"""Inputs that are hard, shared out to ranks: what only one rank meets must count, or end the job, on all of them."""

import copy
from pathlib import Path

import pytest
import ranks as harness
import torch

from wandapp import distributed
from wandapp.pipeline import prune
from wandapp.verify import verify_model

POISON = 249  # a token that only the last sample holds


@pytest.fixture(autouse=True)
def quick(one_thread, monkeypatch):
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 1.0)


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama", num_hidden_layers=2)[0]


def tokens(samples: int, seq_len: int = 24) -> torch.Tensor:
    drawn = torch.randint(0, POISON, (samples, seq_len), generator=torch.Generator().manual_seed(0))
    drawn[-1, 5] = POISON
    return drawn


def on_ranks(model, size: int, folder: Path, calibration: torch.Tensor, **options):
    """(model, report) of rank 0, after a check that all ranks hold the same weights; and of one process."""

    def work(ranks=None):
        copied = copy.deepcopy(model)
        return copied, prune(copied, calibration=calibration, ranks=ranks, **dict(sparsity="2:4") | options)

    ended = harness.run_ranks(size, work, folder)
    assert [end.code for end in ended] == [0] * size, [end.printed for end in ended]
    for end in ended[1:]:
        for one, other in zip(end.result[0].parameters(), ended[0].result[0].parameters(), strict=True):
            assert torch.equal(one, other)
    return *ended[0].result, *work()


@pytest.mark.parametrize(
    "method", ["wanda++", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sparsegpt+ro", "gblm"))]
)
def test_one_sample_for_two_ranks_is_refined_as_by_one(llama, tmp_path, method):
    """The second rank has none; every step is of the first alone, so weights differ by nothing at all."""
    shared, report, alone, _ = on_ranks(llama, 2, tmp_path, tokens(1), method=method, ro_rounds=2)
    assert verify_model(shared, "2:4").ok and report.samples == 1
    for one, other in zip(shared.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method", ["wanda", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sparsegpt", "wanda++"))]
)
def test_activations_of_one_rank_that_are_not_finite_end_all_and_name_the_layer(llama, tmp_path, method, value):
    llama.model.embed_tokens.weight.data[POISON] = value

    def work(ranks):
        prune(llama, calibration=tokens(4), ranks=ranks, method=method, sparsity="2:4")

    ended = harness.run_ranks(2, work, tmp_path, timeout=20)
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].said[0].startswith("model.layers.0.") and len(ended[0].said + ended[1].said) == 1


@pytest.mark.slow
def test_a_singular_hessian_is_damped_alike_and_told_once(llama, tmp_path):
    options = dict(method="sparsegpt", damping=1e-8)
    shared, report, _, alone = on_ranks(llama, 2, tmp_path, tokens(2, 8), **options)
    assert verify_model(shared, "2:4").ok
    damped = [line for line in report.warnings if "damping" in line]
    assert damped and len(set(report.warnings)) == len(report.warnings)
    assert {line.split(":")[0] for line in damped} == {w.split(":")[0] for w in alone.warnings if "damping" in w}


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_an_input_that_only_one_rank_sees_is_not_dead(llama, tmp_path, method):
    """Input 0 of the first block's q, k and v is zero for every token but the one that the last rank alone holds."""
    embedding = llama.model.embed_tokens.weight.data
    embedding[:POISON, 0] = 0.0
    embedding[POISON, 0] = 40.0
    shared, _, alone, _ = on_ranks(llama, 2, tmp_path, tokens(4), method=method)
    first, second = (m.model.layers[0].self_attn.q_proj.weight for m in (shared, alone))
    assert (first[:, 0] != 0).any()
    assert torch.equal(first != 0, second != 0)


@pytest.mark.slow
def test_an_input_that_is_dead_on_every_rank_is_zeroed(llama, tmp_path):
    llama.model.embed_tokens.weight.data[:, 0] = 0.0
    shared, _, _, _ = on_ranks(llama, 3, tmp_path, tokens(4), method="sparsegpt")
    assert (shared.model.layers[0].self_attn.q_proj.weight[:, 0] == 0).all()
