"""Block reconstruction: one step against fp64 autograd, what may change and what may not, and that it never gets worse."""

import copy

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import wandapp
from wandapp import descent
from wandapp.blocks import find_blocks
from wandapp.config import PruneConfig
from wandapp.descent import rate_factor
from wandapp.methods.base import output_error
from wandapp.methods.refiner import LossScale

LR = 1e-3


def tokens_of(samples: int):
    return torch.randint(0, 256, (samples, 24), generator=torch.Generator().manual_seed(3))


def prune(model, method, samples=16, **options):
    options = {"sparsity": "2:4", "reconstruct_lr": 0.01, "batch_size": 4} | options
    return wandapp.prune(model, None, calibration=tokens_of(samples), method=method, **options)


def states_after_blocks(model, tokens):
    """What each decoder block of a model in fp64 gives for tokens: a list of [samples, seq_len, hidden_size]."""
    states = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: states.append(output)) for block in find_blocks(model)[1]
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return states


def steps_down(module, trained, named) -> int:
    """How many values of `trained` lie one step of LR below those of module, whose gradients are known; asserts that all do.

    named   (name, parameter) of module to compare
    """
    moved = 0
    for name, parameter in named:
        before, after = parameter.detach(), trained.get_parameter(name).detach().double()
        kept = before != 0
        rate = LR * before[kept].square().mean().sqrt()
        clear = kept & (parameter.grad.abs() > 1e-6 * parameter.grad.abs().max())  # fp32 knows the sign of these
        step = (before - after)[clear]
        torch.testing.assert_close(step, rate * parameter.grad[clear].sign(), rtol=1e-2, atol=1e-7)
        assert torch.equal(after[~kept], torch.zeros_like(after[~kept]))
        moved += clear.sum().item()
    return moved


def backward_of_error(output, wanted, kind):
    error = output - wanted
    if kind == "token":
        error = error / wanted.square().mean(-1, keepdim=True).sqrt()
    error.square().sum().backward()


@pytest.mark.parametrize("target", ["pruned-path", "dense-path"])
@pytest.mark.parametrize("kind", ["token", "frobenius"])
def test_first_step_moves_each_kept_weight_by_its_rate_against_the_gradient(tiny_model, kind, target):
    """On the second block, where the two targets differ."""
    dense, tokens = tiny_model("llama")[0], tokens_of(1)
    trained = copy.deepcopy(dense)
    options = {"reconstruct_passes": 1, "reconstruct_lr": LR, "reconstruct_loss": kind, "reconstruct_target": target}
    wandapp.prune(trained, None, calibration=tokens, method="wanda+reconstruct", **options)
    untrained = copy.deepcopy(dense)  # its second block as the first step finds it
    find_blocks(untrained)[1][0].load_state_dict(find_blocks(trained)[1][0].state_dict())
    wandapp.prune(untrained, None, calibration=tokens, method="wanda", skip=(r"layers\.0\.",))

    model, dense = untrained.double(), copy.deepcopy(dense).double()
    if target == "pruned-path":
        find_blocks(dense)[1][0].load_state_dict(find_blocks(model)[1][0].state_dict())
    wanted, module = states_after_blocks(dense, tokens)[1], find_blocks(model)[1][1]
    outputs = []
    module.register_forward_hook(lambda _, args, output: outputs.append(output))
    model(tokens)
    backward_of_error(outputs[0], wanted, kind)
    assert steps_down(module, find_blocks(trained)[1][1], module.named_parameters()) > 10_000


@pytest.mark.parametrize("family, attention", [("llama", "self_attn"), ("gpt_neox", "attention")])
def test_attention_steps_by_its_own_error_and_then_the_rest_by_the_blocks(tiny_model, family, attention):
    dense, tokens = tiny_model(family, num_hidden_layers=1)[0], tokens_of(1)
    trained, model = copy.deepcopy(dense), copy.deepcopy(dense)
    options = {"reconstruct_passes": 1, "reconstruct_lr": LR, "reconstruct_region": "sub-block"}
    wandapp.prune(trained, None, calibration=tokens, method="wanda+reconstruct", **options)
    wandapp.prune(model, None, calibration=tokens, method="wanda")

    module, teacher, trained = (find_blocks(m.double())[1][0] for m in (model, dense, trained))
    seen = {}
    for role, block in (("is", module), ("wanted", teacher)):
        block.register_forward_hook(lambda _, args, out, role=role: seen.update({f"block {role}": out}))
        hook = lambda _, args, out, role=role: seen.update({role: out[0]})  # noqa: E731
        block.get_submodule(attention).register_forward_hook(hook)
    with torch.no_grad():
        dense(tokens)
    model(tokens)
    backward_of_error(seen["is"], seen["wanted"], "token")
    of_attention = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    assert {name.split(".")[0] for name, _ in of_attention} == {attention, "input_layernorm"}
    assert steps_down(module, trained, of_attention) > 5_000

    rest = [(name, p) for name, p in module.named_parameters() if p.grad is None]
    with torch.no_grad():
        for name, parameter in of_attention:
            parameter.copy_(trained.get_parameter(name))
    model(tokens)
    backward_of_error(seen["block is"], seen["block wanted"], "token")
    assert steps_down(module, trained, rest) > 5_000


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sub_blocks_of_every_family(tiny_model, family):
    model, plain = tiny_model(family)[0], tiny_model(family)[0]
    report = prune(model, "wanda+reconstruct", reconstruct_region="sub-block", reconstruct_passes=1)
    prune(plain, "wanda")
    before = plain.state_dict()
    assert not report.warnings
    assert all(block.error < block.error_before for block in report.blocks)
    stays = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert not [name for name in stays if find_blocks(model)[0] in name], "something of a block was in neither part"


def test_a_block_of_one_module_is_trained_as_a_whole_and_says_so(tiny_model):
    model, plain = tiny_model("llama")[0], tiny_model("llama")[0]
    for block in model.model.layers:  # one module around both
        block.forward, block.whole = type(block).forward.__get__(block), torch.nn.ModuleDict(block._modules)
        for name in list(block.whole):
            block.__dict__[name] = block._modules.pop(name)
    report = prune(model, "wanda+reconstruct", reconstruct_region="sub-block")
    prune(plain, "wanda+reconstruct")
    assert len(report.warnings) == 3 and all("reconstructed as a whole" in warning for warning in report.warnings)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


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


def test_a_rate_that_destroys_the_block_leaves_the_earlier_weights_and_says_so(tiny_model):
    plain, wild = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(plain, "wanda")
    report = prune(wild, "wanda+reconstruct", reconstruct_lr=50.0)
    assert len(report.warnings) == 3 and all("no pass of reconstruction left less" in w for w in report.warnings)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, wild.state_dict()[name]), name


def test_the_dense_path_leaves_the_model_nearer_to_the_dense_one(tiny_model):
    dense, tokens = tiny_model("llama")[0], tokens_of(16)
    errors = {}
    for target in ("pruned-path", "dense-path"):
        model = copy.deepcopy(dense)
        prune(model, "wanda+reconstruct", reconstruct_target=target, reconstruct_loss="frobenius")
        states, wanted = (states_after_blocks(m, tokens)[-1] for m in (model, dense))
        errors[target] = (states - wanted).norm() / wanted.norm()
    assert errors["dense-path"] < errors["pruned-path"]


@pytest.mark.parametrize("method", ["wanda+reconstruct", "wanda+ro+reconstruct", "wanda+reconstruct+ro"])
def test_the_dense_path_is_followed_wherever_the_refiner_stands(tiny_model, method):
    report = prune(tiny_model("llama")[0], method, ro_rounds=1, ro_samples=2, reconstruct_passes=1, reconstruct_lr=1e-3)
    assert "dense path" in report.seconds_by_phase
    assert all(block.error < block.error_before for block in report.blocks)


def test_more_samples_get_fewer_passes_unless_their_number_is_given():
    passes = {samples: PruneConfig().passes_of_reconstruction(samples) for samples in (1, 64, 128, 256, 4096)}
    assert passes == {1: 4, 64: 4, 128: 2, 256: 2, 4096: 2}
    assert PruneConfig(reconstruct_passes=5).passes_of_reconstruction(128) == 5


@pytest.mark.parametrize("has_it", [True, False])
def test_compute_auto_takes_bfloat16_where_the_device_multiplies_it(tiny_model, monkeypatch, has_it):
    monkeypatch.setattr(descent, "multiplies_bfloat16", lambda device: has_it)
    models = {compute: tiny_model("llama")[0] for compute in ("auto", "bfloat16", "storage")}
    for compute, model in models.items():
        prune(model, "wanda+reconstruct", reconstruct_passes=1, reconstruct_compute=compute)
    states = {compute: model.state_dict()["model.layers.1.mlp.up_proj.weight"] for compute, model in models.items()}
    assert torch.equal(states["auto"], states["bfloat16"]) == has_it
    assert torch.equal(states["auto"], states["storage"]) != has_it


def test_products_in_bfloat16_leave_masters_and_storage_in_fp32(tiny_model):
    exact, coarse = tiny_model("llama")[0], tiny_model("llama")[0]
    prune(exact, "wanda+reconstruct")
    report = prune(coarse, "wanda+reconstruct", reconstruct_compute="bfloat16")
    assert all(block.error < block.error_before for block in report.blocks)
    ours, theirs = coarse.state_dict(), exact.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert ours[name].dtype == torch.float32
    assert not torch.equal(ours[name], ours[name].bfloat16().float())
    assert not torch.equal(ours[name], theirs[name])
    torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0.1 * theirs[name].abs().max().item())


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


def with_states_of(scale: float, model):
    """The model with hidden states of another size, so that a token's gradients, divided by its RMS, are 1/scale larger."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(scale)
            block.mlp.down_proj.weight.mul_(scale)
    return model


@pytest.mark.parametrize("method", ["wanda+reconstruct", "wanda+ro"])
def test_gradients_that_overflow_float16_are_scaled(tiny_model, method):
    reports = [
        prune(with_states_of(0.005, tiny_model("llama")[0]).to(dtype), method, ro_rounds=2, ro_samples=8)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    for half, brain in zip(*(report.blocks for report in reports), strict=True):
        assert half.error < half.error_before
        assert half.error == pytest.approx(brain.error, rel=0.03)
    assert not reports[0].warnings


def test_steps_without_finite_gradients_are_left_out_and_counted():
    scale, asked = LossScale([torch.nn.Parameter(torch.zeros(1, dtype=torch.float16))]), []

    def gradients(factor):
        asked.append(factor)
        return [torch.tensor([float("inf")])]

    (found,) = scale.run(gradients)
    assert found.item() == 0.0 and len(asked) == LossScale.TRIES and asked[1] == asked[0] * LossScale.LOWER
    warnings = []
    scale.tell("block", warnings)
    assert warnings == ["block: 1 steps were left out, as their gradients overflow float16"]


def bare_olmo():
    """Norms without weights, maps without biases."""
    config = AutoConfig.for_model(
        "olmo", vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    return model


@pytest.mark.parametrize("region", ["block", "sub-block"])
@pytest.mark.parametrize("skip", ["mlp", "self_attention|self_attn", r"(layers|h)\.0\."])
@pytest.mark.parametrize("family", ["falcon", "olmo"])
def test_parts_in_which_nothing_is_pruned_are_no_trouble(tiny_model, family, skip, region):
    model = bare_olmo() if family == "olmo" else tiny_model(family)[0]
    report = prune(model, "wanda+reconstruct", reconstruct_region=region, reconstruct_passes=1, skip=(skip,))
    assert report.blocks[1].error < report.blocks[1].error_before


@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_the_best_preset_passes_by_a_block_that_stays_dense(tiny_model, sparsity):
    model, dense = tiny_model("llama")[0], tiny_model("llama")[0]
    options = dict(preset="best", self_samples=2, ro_rounds=1, ro_samples=2, reconstruct_passes=1)
    report = prune(model, "wanda+ro+reconstruct", sparsity=sparsity, skip=(r"layers\.0\.",), **options)
    assert report.zeros == report.weights // 2 and report.blocks[0].weights == 0
    first, before = model.model.layers[0], dense.model.layers[0]
    assert torch.equal(first.mlp.down_proj.weight, before.mlp.down_proj.weight)


@pytest.mark.parametrize("method", ["wanda+ro", "wanda+reconstruct"])
def test_an_expert_that_is_skipped_stays_as_it_is(tiny_model, method):
    model, dense = tiny_model("mixtral")[0], tiny_model("mixtral")[0]
    prune(model, method, skip=(r"experts\.down_proj\.0$",), ro_rounds=3, ro_samples=16, reconstruct_passes=1)
    trained = 0
    for block, before in zip(model.model.layers, dense.model.layers, strict=True):
        now, then = block.mlp.experts.down_proj, before.mlp.experts.down_proj
        assert torch.equal(now[0], then[0])
        trained += not torch.equal(now[1], then[1] * (now[1] != 0))
    assert trained


@pytest.mark.parametrize("seed", [10**15, 2**63 - 1])
def test_any_seed_will_do(tiny_model, seed):
    prune(tiny_model("llama")[0], "wanda+ro+reconstruct", seed=seed, ro_rounds=1, ro_samples=1, reconstruct_passes=1)


def test_states_on_another_device_than_the_block_are_compared_there():
    with FakeTensorMode(allow_non_fake_inputs=True):
        output, target = torch.empty(1, 2, 4, device="cuda"), torch.empty(1, 2, 4)
        assert output_error(output, target, "token").device == output.device
