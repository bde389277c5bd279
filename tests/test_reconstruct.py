"""Block reconstruction: one step against fp64 autograd, what may change and what may not, and that it never gets worse."""

import copy

import pytest
import torch

import wandapp
from wandapp.blocks import find_blocks
from wandapp.methods.reconstruct import rate_factor
from wandapp.pattern import SparsityPattern
from wandapp.store import ModelStore

LR = 1e-3


def tokens_of(samples: int):
    return torch.randint(0, 256, (samples, 24), generator=torch.Generator().manual_seed(3))


def prune(model, method, samples=16, **options):
    options = {"sparsity": "2:4", "reconstruct_lr": 0.01, "batch_size": 4} | options
    return wandapp.prune(model, None, calibration=tokens_of(samples), method=method, **options)


def first_block_in_fp64(model, tokens):
    """(inputs, dense outputs, function of the block) of the first decoder block, all in fp64."""
    store = ModelStore(model, SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    hidden = store.record(tokens, len(tokens)).double()
    with store.open_block(0) as block, torch.no_grad():
        return hidden, block.module.double()(hidden, *block.calls[len(tokens)].args, **block.calls[len(tokens)].kwargs)


@pytest.mark.parametrize("kind", ["token", "frobenius"])
def test_first_step_moves_each_kept_weight_by_its_rate_against_the_gradient(tiny_model, kind):
    dense = tiny_model("llama")[0]
    pruned = copy.deepcopy(dense)
    tokens = tokens_of(1)
    wandapp.prune(pruned, None, calibration=tokens, method="wanda")
    trained = copy.deepcopy(dense)
    options = {"reconstruct_passes": 1, "reconstruct_lr": LR, "reconstruct_loss": kind}
    wandapp.prune(trained, None, calibration=tokens, method="wanda+reconstruct", **options)

    _, target = first_block_in_fp64(copy.deepcopy(dense), tokens)
    model = copy.deepcopy(pruned)
    store = ModelStore(model, SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    hidden = store.record(tokens, 1).double()
    with store.open_block(0) as block:
        module, call = block.module.double(), block.calls[1]
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        error = module(hidden, *call.args, **call.kwargs) - target
        if kind == "token":
            error = error / target.square().mean(-1, keepdim=True).sqrt()
        error.square().sum().backward()
        moved = 0
        for name, parameter in module.named_parameters():
            before, after = parameter.detach(), find_blocks(trained)[1][0].get_parameter(name).detach().double()
            kept = before != 0
            rate = LR * before[kept].square().mean().sqrt()
            clear = kept & (parameter.grad.abs() > 1e-6 * parameter.grad.abs().max())  # fp32 knows the sign of these
            step = (before - after)[clear]
            torch.testing.assert_close(step, rate * parameter.grad[clear].sign(), rtol=1e-2, atol=1e-7)
            assert torch.equal(after[~kept], torch.zeros_like(after[~kept]))
            moved += clear.sum().item()
    assert moved > 10_000


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_pattern_and_removed_weights_stay_and_the_held_out_error_falls(tiny_model, family, sparsity):
    model = tiny_model(family)[0]
    report = prune(model, "wanda+reconstruct", sparsity=sparsity)
    assert wandapp.verify_model(model, sparsity).ok
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    for block in report.blocks:
        assert block.error < block.error_before, block.name


def test_only_the_blocks_linear_maps_and_vectors_change(tiny_model):
    model = tiny_model("qwen2")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune(model, "wanda+reconstruct")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith("model.layers.") for name in changed)
    assert any(name.endswith("layernorm.weight") for name in changed)
    assert any(name.endswith("q_proj.bias") for name in changed)


def test_without_passes_it_is_the_method_inside_bit_for_bit(tiny_model):
    plain, idle = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(plain, "sparsegpt")
    prune(idle, "sparsegpt+reconstruct", reconstruct_passes=0)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, idle.state_dict()[name]), name


def test_a_rate_that_destroys_the_block_leaves_the_earlier_weights(tiny_model):
    plain, wild = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(plain, "wanda")
    prune(wild, "wanda+reconstruct", reconstruct_lr=50.0)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, wild.state_dict()[name]), name


def test_bf16_weights_learn_through_fp32_masters(tiny_model):
    model = tiny_model("llama")[0].to(torch.bfloat16)
    report = prune(model, "wanda+reconstruct")
    assert wandapp.verify_model(model, "2:4").ok
    assert report.blocks[0].error < report.blocks[0].error_before


def test_magnitude_with_a_refiner_reads_every_sample(tiny_model):
    one, many = tiny_model("llama")[0], tiny_model("llama")[0]
    assert prune(many, "magnitude+reconstruct").samples == 16
    assert prune(one, "magnitude").samples == 1


def test_rates_warm_up_then_fall_to_zero():
    factors = [rate_factor(step, 40) for step in range(40)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b for a, b in zip(factors[4:], factors[5:], strict=False))
    assert factors[-1] < 0.01
    assert rate_factor(0, 1) == 1.0
