"""End-to-end tuning: its gradients against the whole model's, what it may change, and that it never gets worse."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch.nn.functional import kl_div

import wandapp
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.pattern import SparsityPattern
from wandapp.store import ModelStore
from wandapp.tuning import Tuned, _Tuning, vectors_of
from wandapp.verify import verify_model

SAMPLES, HELD_OUT = 48, 4


def tokens_of(samples: int = SAMPLES):
    return torch.randint(0, 256, (samples, 24), generator=torch.Generator().manual_seed(3))


def prune(model, method="wanda", **options):
    options = {"sparsity": "2:4", "batch_size": 4, "tune_passes": 2, "tune_lr": 0.003} | options
    return wandapp.prune(model, None, calibration=tokens_of(), method=method, **options)


def divergence(model, dense, tokens) -> torch.Tensor:
    """Mean over tokens of KL(dense || model)."""
    with torch.no_grad():
        expected = dense(input_ids=tokens).logits.log_softmax(-1)
    found = model(input_ids=tokens).logits.log_softmax(-1)
    return kl_div(found, expected, reduction="sum", log_target=True) / tokens.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_gradients_are_those_of_the_whole_models_divergence(tiny_model, family):
    """dL/dg_i = sum_j W_ij dL/dW_ij + b_i dL/db_i at g = 1, by autograd through the model's own forward."""
    model, dense = tiny_model(family)[0], tiny_model(family)[0]
    prune(model, tune_passes=0)
    tokens, config = tokens_of(), PruneConfig(tune_passes=1).resolved()
    store = ModelStore(model.eval(), SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    hidden = store.record(tokens, 4)
    with torch.no_grad():
        last = dense(input_ids=tokens, output_hidden_states=True)
    dense_store = ModelStore(dense.eval(), SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    states = dense_store.record(tokens, 4)
    for index in range(len(dense_store)):
        with dense_store.open_block(index) as block:
            block.run_(states)
    assert last.logits.shape[:2] == states.shape[:2]
    with ExitStack() as stack:
        blocks = [stack.enter_context(store.open_block(index)) for index in range(len(store))]
        tuning = _Tuning(store, blocks, tokens, hidden, states, config, Ranks())
        tuning._set_gradients(torch.tensor([5]))
        found = {name: gain.grad.clone() for name, gain in tuning.gains.items()}
        found |= {name: tuning.vectors.values[p].grad.clone() for name, p in tuning.named.items()}
        views = {view.name: view for block in blocks for view in block.linears.values()}
        model.requires_grad_(True)
        (divergence(model, dense, tokens[5:6]) * tokens.shape[1]).backward()
        for name, gradient in found.items():
            if name in tuning.named:
                expected = tuning.named[name].grad
            else:
                view = views[name]
                expected = (view.weight * view.of(view.parameter.grad)).sum(dim=1)
                bias = getattr(model.get_submodule(name), "bias", None)
                expected = expected if bias is None else expected + bias.detach() * bias.grad
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)
    assert len(tuning.gains) == len(views) and tuning.named


def test_what_is_kept_stays_so_where_a_gain_would_round_it_to_zero(tiny_model):
    model = tiny_model("llama")[0].to(torch.float16)
    store = ModelStore(model.eval(), SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    store.record(tokens_of(4), 4)
    with torch.no_grad(), store.open_block(0) as block:
        view = next(iter(block.linears.values()))
        view.weight[0, :4] = torch.tensor([6e-8, 0.0, -6e-8, 1.0])
        Tuned(1.0, 0.5, {view.name: torch.full((len(view.weight),), 0.5)}, vectors_of(block)).apply(block)
        smallest = 2.0**-24
        assert view.weight[0, :4].tolist() == [smallest, 0.0, -smallest, 0.5]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gpt_neox", "mixtral"])
def test_what_is_written_back_is_what_was_learnt(tiny_model, family):
    """The report's divergences are the models' own, so every gain went where its product is; zeros stay."""
    model, dense = tiny_model(family)[0], tiny_model(family)[0]
    plain = tiny_model(family)[0]
    prune(plain, tune_passes=0)
    report = prune(model)
    held_out = tokens_of()[:HELD_OUT]
    before, after = (divergence(m.eval(), dense.eval(), held_out).item() for m in (plain, model))
    assert report.tuning["divergence_before"] == pytest.approx(before, rel=1e-3)
    assert report.tuning["divergence_after"] == pytest.approx(after, rel=1e-3)
    assert after < before and not report.warnings
    assert verify_model(model, "2:4").ok and verify_model(model, "2:4").negative_zeros == 0
    assert all(block.tuned for block in report.blocks) and report.seconds_by_phase["tune"] > 0


def test_only_rows_and_vectors_of_blocks_change(tiny_model):
    model, plain = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(plain, tune_passes=0)
    prune(model)
    before, changed = plain.state_dict(), set()
    for name, value in model.state_dict().items():
        old = before[name]
        if torch.equal(value, old):
            continue
        changed.add(name)
        if value.dim() == 2:
            kept = old != 0
            assert torch.equal(value != 0, kept)
            ratio = torch.where(kept, value / old, torch.nan)
            assert (ratio.nan_to_num(0).amax(1) - ratio.nan_to_num(9).amin(1)).abs().max() < 1e-4  # one factor a row
    assert changed and all(name.startswith("model.layers.") for name in changed)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} >= {
        "input_layernorm",
        "down_proj",
        "q_proj",
    }


def test_a_tuning_that_makes_it_worse_is_not_applied(tiny_model):
    model, plain = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(plain, tune_passes=0)
    report = prune(model, tune_lr=30.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert any("not tuned end to end" in warning for warning in report.warnings)
    assert not any(block.tuned for block in report.blocks)


def test_a_model_that_does_not_fit_the_device_is_left_untuned(tiny_model, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("wandapp.pipeline.tune", full)
    model, plain = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(plain, tune_passes=0)
    report = prune(model)
    assert report.warnings == ["not tuned end to end: the whole model does not fit cpu"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_tuning_that_breaks_off_leaves_the_blocks_as_they_were(tiny_model, monkeypatch):
    divergence_of, calls = ModelStore.divergence, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > HELD_OUT + 10:  # ten steps were taken
            raise torch.OutOfMemoryError
        return divergence_of(*arguments)

    model, plain = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(plain, tune_passes=0)
    monkeypatch.setattr(ModelStore, "divergence", full)
    report = prune(model)
    assert report.warnings == ["not tuned end to end: the whole model does not fit cpu"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_in_16_bits_keeps_its_type_and_gains(tiny_model, dtype):
    model = tiny_model("llama")[0].to(dtype)
    report = prune(model)
    assert {p.dtype for p in model.parameters()} == {dtype} and not report.warnings
    assert report.tuning["divergence_after"] < report.tuning["divergence_before"]


def test_reconstruction_towards_the_pruned_path_stays_that(tiny_model):
    """Tuning follows the dense path; the method inside must not read it because of that."""
    options = dict(method="wanda+reconstruct", reconstruct_target="pruned-path", reconstruct_passes=1)
    plain, tuned = (prune(tiny_model("llama")[0], **options, tune_passes=passes) for passes in (0, 1))
    assert [block.error for block in plain.blocks] == [block.error for block in tuned.blocks]


def test_what_is_reported_is_the_divergence_of_the_model_that_is_left(tiny_model):
    """In the weights' own type, whatever type the steps compute in."""
    model, dense = tiny_model("llama")[0], tiny_model("llama")[0]
    report = prune(model, reconstruct_compute="bfloat16")
    found = divergence(model, dense, tokens_of()[:HELD_OUT]).item()
    assert report.tuning["divergence_after"] == pytest.approx(found, rel=1e-5)


def test_flops_and_vectors_are_counted(tiny_model):
    model = tiny_model("gpt2")[0]
    plain = prune(copy.deepcopy(model), tune_passes=0)
    report = prune(model, tune_passes=1)
    store = ModelStore(model, SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    store.record(tokens_of(), 4)
    with store.open_block(0) as block:
        assert len(vectors_of(block)) == 8  # two norms of two, four biases
        forward = len(store) * 24 * block.forward_flops_per_token  # of one sample
    # the dense path; a step is three forwards; divergences before and after the only pass
    added = forward * (SAMPLES + 3 * (SAMPLES - HELD_OUT) + 2 * HELD_OUT)
    assert report.flops - plain.flops == pytest.approx(added, rel=0.01)
