"""Recovery training: the masked equations, zeros that never move, merges that are refused, runs that continue bit for bit."""

import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from wandapp import WandappError, load_model, masked, recovery, save_pruned, verify_model
from wandapp.config import PruneConfig
from wandapp.recover_config import RecoverConfig
from wandapp.recovery import recover
from wandapp.training import Step, TrainingState, learning_rate_factor, train

OPTIONS = dict(text="pydoc", samples=6, held_out=2, seq_len=32, save_every=2)
LORA = RecoverConfig(preset="strong", rank=4, alpha=6.0).resolved()


@pytest.fixture
def pruned(tiny_model, tiny_tokenizer, pruned_checkpoint):
    """pruned(family) -> folder of a 2:4 checkpoint."""
    return lambda family="llama", **fields: pruned_checkpoint(family, "2:4", **fields)[1]


def with_random_updates(model):
    """B starts at 0; give it values, so that an adapter does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def zeros(model) -> dict[str, torch.Tensor]:
    return {view.name: view.weight == 0 for view in masked.linear_views(model)}


# The equation


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_adapter_computes_the_masked_product(kind):
    """y = x (W + mask * (B A) * alpha / r)^T + b in float64 loops, and its gradients by finite differences."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.layer = nn.Linear(8, 6) if kind is nn.Linear else Conv1D(6, 8)
    holder.double()
    with torch.no_grad():
        holder.layer.weight[torch.rand(holder.layer.weight.shape) < 0.5] = 0
    weight = holder.layer.weight.detach().clone()
    weight = weight if kind is nn.Linear else weight.T  # [out, in]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], fan_in_fan_out=kind is Conv1D)
    config._register_custom_module({kind: masked.MaskedLora})
    inject_adapter_in_model(config, holder)
    with_random_updates(holder)
    holder.layer.double()
    a, b = (getattr(holder.layer, f"lora_{x}")["default"].weight for x in "AB")
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for token in range(5):
        for row in range(6):
            expected[token, row] = holder.layer.base_layer.bias[row]
            for column in range(8):
                if weight[row, column] != 0:
                    update = sum(b[row, k] * a[k, column] for k in range(2)) * 3 / 2
                    expected[token, row] += x[token, column] * (weight[row, column] + update)
    torch.testing.assert_close(holder.layer(x), expected, rtol=1e-12, atol=1e-12)

    def loss(a_values, b_values):
        with torch.no_grad():
            a.copy_(a_values), b.copy_(b_values)
        return holder.layer(x).square().sum().item()

    holder.layer(x).square().sum().backward()
    start_a, start_b, nudge = a.detach().clone(), b.detach().clone(), 1e-6
    for gradient, place in ((a.grad[1, 3], "a"), (b.grad[4, 0], "b")):
        shift_a, shift_b = torch.zeros_like(start_a), torch.zeros_like(start_b)
        (shift_a if place == "a" else shift_b)[(1, 3) if place == "a" else (4, 0)] = nudge
        slope = loss(start_a + shift_a, start_b + shift_b) - loss(start_a - shift_a, start_b - shift_b)
        assert float(gradient) == pytest.approx(slope / (2 * nudge), rel=1e-6)


SLOW = [
    pytest.param(family, marks=pytest.mark.slow) for family in ("phi3", "opt", "gpt_neox", "bloom", "mixtral", "gemma3")
]


# Every family: where adapters go, and that merging keeps pattern and function


@pytest.mark.parametrize("family", ["llama", "gpt2", *SLOW])
def test_merge_keeps_the_zeros_and_the_function(family, pruned, tiny_model):
    model, _ = load_model(pruned(family))
    before = zeros(model)
    names = masked.add_adapters(model, LORA)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with_random_updates(model)
    with torch.no_grad():
        trained = model(ids).logits
        dense = [view.weight.clone() for view in masked.linear_views(tiny_model(family)[0])]
        assert masked.merge_(model) == len(names) > 0
        merged = model(ids).logits
    torch.testing.assert_close(merged, trained, rtol=2e-5, atol=2e-5)
    assert verify_model(model, "2:4").ok and verify_model(model, "2:4").negative_zeros == 0
    assert all(torch.equal(before[name], now) for name, now in zeros(model).items())
    assert len(dense) == len(before), "no map was lost"
    assert type(model.get_submodule(names[0])) in (nn.Linear, Conv1D)


@pytest.mark.parametrize(
    ("family", "leaves"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("opt", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("phi3", {"qkv_proj"}),
        ("gpt_neox", {"query_key_value"}),
        ("falcon", {"query_key_value"}),
    ],
)
def test_query_and_value_are_found_in_other_families(family, leaves, tiny_model):
    names = masked.choose_targets(tiny_model(family)[0], "qv")
    assert {name.rpartition(".")[2] for name in names} == leaves and len(names) == 3 * len(leaves)


def test_targets_by_expression_and_none_at_all(tiny_model):
    model = tiny_model("llama")[0]
    assert masked.choose_targets(model, r"layers\.0\..*_proj$") == [
        name for name in masked.choose_targets(model, "all") if ".0." in name
    ]
    with pytest.raises(
        WandappError, match="'up' matches no linear map of GPT2LMHeadModel; its last block has .*c_proj"
    ):
        masked.choose_targets(tiny_model("gpt2")[0], "up")
    with pytest.raises(WandappError, match="is no regular expression"):
        masked.choose_targets(model, "(")


# Merges that would destroy the pattern


def test_adapter_of_plain_lora_is_refused(pruned):
    model, _ = load_model(pruned())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    weight = model.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    with pytest.raises(WandappError, match=r"q_proj: this adapter was trained without the mask.*2048 zeros"):
        masked.merge_(model)
    assert torch.equal(weight, before)


def test_weights_that_changed_since_are_refused(pruned):
    model, _ = load_model(pruned())
    masked.add_adapters(model, LORA)
    layer = model.model.layers[2].mlp.down_proj.base_layer
    with torch.no_grad():
        layer.weight[0, :4] = 1.0
    with pytest.raises(WandappError, match=r"layers\.2\.mlp\.down_proj: 2 weights have become zero or non-zero since"):
        masked.merge_(model)


def test_a_checkpoint_that_lost_its_pattern_is_refused(pruned, tmp_path):
    model, tokenizer = load_model(pruned())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7, 8:12] = 1.0
    save_pruned(model, tokenizer, tmp_path / "a", files={"wandapp/recipe.yaml": "sparsity: '2:4'\n"})
    with pytest.raises(WandappError, match=r"does not hold its pattern \(model.layers.1.mlp.up_proj: row 7"):
        recover(tmp_path / "a", tmp_path / "b", **OPTIONS)
    assert not (tmp_path / "b").exists()


# The loop


def test_learning_rate_rises_and_falls():
    def factors(**options):
        config = RecoverConfig(**options).resolved()
        return [round(learning_rate_factor(step, 4, config), 4) for step in range(4)]

    assert factors(schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert factors(schedule="cosine", warmup=0.25) == [0.5, 1, 0.75, 0.25]
    assert factors(schedule="constant") == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "options",
    [dict(preset="strong"), dict(full=True, lr=1e-3), pytest.param(dict(dropout=0.2), marks=pytest.mark.slow)],
)
def test_training_lowers_perplexity_and_keeps_every_zero(options, pruned, tmp_path):
    report = recover(pruned(), tmp_path / "out", **OPTIONS | options | dict(samples=24))
    assert report.after["held-out"]["perplexity"] < report.before["held-out"]["perplexity"]
    model, _ = load_model(tmp_path / "out")
    found, expected = zeros(model), zeros(load_model(pruned()).model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert verify_model(model, "2:4").negative_zeros == 0
    assert report.steps == 24 and report.tokens == 24 * 32


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_adapters_are_fp32_whatever_is_frozen(stored, pruned, tmp_path):
    folder, trained = pruned("llama", dtype=stored), {}

    def note(model, *args, **kwargs):
        trained.update({name: p.dtype for name, p in model.named_parameters() if p.requires_grad})
        return train(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "train", note)
        report = recover(folder, tmp_path / "out", **OPTIONS | dict(samples=24, preset="strong", dtype="bfloat16"))
    assert set(trained.values()) == {torch.float32} and all("lora_" in name for name in trained)
    assert report.after["held-out"]["perplexity"] < report.before["held-out"]["perplexity"]
    assert {p.dtype for p in load_model(tmp_path / "out").model.parameters()} == {getattr(torch, stored)}


@pytest.mark.slow
def test_bfloat16_checkpoint_stays_one(pruned, tmp_path):
    folder = pruned("llama", dtype="bfloat16")
    for name, options in {
        "a": dict(dtype="bfloat16"),
        "b": dict(full=True, lr=1e-2, gradient_checkpointing=True),
    }.items():
        recover(folder, tmp_path / name, **OPTIONS | options)
        model, _ = load_model(tmp_path / name)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert verify_model(model, "2:4").ok and verify_model(model, "2:4").negative_zeros == 0


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_weight(pruned, tmp_path):
    for name, checkpointing in {"a": False, "b": True}.items():
        recover(pruned(), tmp_path / name, **OPTIONS, preset="strong", gradient_checkpointing=checkpointing)
    a, b = (load_model(tmp_path / name).model.state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


class _Killed(BaseException):
    """Not an Exception: nothing in between may handle it."""


@pytest.mark.parametrize("options", [dict(dropout=0.3), dict(full=True)])
def test_killed_run_continues_bit_for_bit(options, pruned, tmp_path):
    settings = OPTIONS | options

    def kill(step: Step, steps: int) -> None:
        if step.step == 5:  # saved after 2 and 4; step 5 is taken again
            raise _Killed

    recover(pruned(), tmp_path / "whole", **settings, resume=True)  # begins where there is nothing to resume
    with pytest.raises(_Killed):
        recover(pruned(), tmp_path / "killed", **settings, on_step=kill)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(WandappError, match="holds the state of an unfinished run; continue it with --resume"):
        recover(pruned(), tmp_path / "killed", **settings)
    with pytest.raises(WandappError, match="(seed|tokens) was .* when it was saved and is"):
        recover(pruned(), tmp_path / "killed", **settings | dict(seed=3), resume=True)
    taken = []
    report = recover(
        pruned(), tmp_path / "killed", **settings, resume=True, on_step=lambda step, steps: taken.append(step.step)
    )
    assert taken == [5, 6] and report.steps == 6
    for name in ("model.safetensors", "wandapp/recover.yaml"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "wandapp/recover-loss.jsonl").open()]
        for run in ("whole", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert not (tmp_path / "killed.recover").exists()


def test_damaged_state_is_refused(tmp_path):
    state = TrainingState(tmp_path, {"lr": "1"})
    assert state.load() == (0, {})
    state.save(3, {"a": torch.ones(2)})
    with pytest.raises(WandappError, match="lr was 1 when it was saved and is 2 now"):
        TrainingState(tmp_path, {"lr": "2"}).load()
    (tmp_path / "state.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WandappError, match="not a readable training state"):
        state.load()


def test_a_loss_that_is_not_finite_names_the_step(pruned, tmp_path):
    with pytest.raises(WandappError, match="step [2-6]: the loss is (nan|inf).*lower --lr"):
        recover(pruned(), tmp_path / "out", **OPTIONS, full=True, lr=1e30, warmup=0)


# What is written


def test_output_is_as_prune_writes_it(pruned, tmp_path):
    recover(pruned(), tmp_path / "out", **OPTIONS, preset="strong")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    companions = {f"wandapp/{name}" for name in ("recipe.yaml", "recover.yaml", "recover.json", "recover-loss.jsonl")}
    assert {"model.safetensors", "README.md", "wandapp/recover-loss.png"} | companions <= names
    assert PruneConfig.from_yaml(tmp_path / "out/wandapp/recipe.yaml").sparsity == "2:4"
    again = RecoverConfig.from_yaml(tmp_path / "out/wandapp/recover.yaml")
    assert (again.rank, again.targets, again.preset) == (32, "all", "strong")
    report = json.loads((tmp_path / "out/wandapp/recover.json").read_text())
    assert report["before"]["held-out"]["tokens"] == 2 * 31 and report["versions"]["peft"]


def test_command(pruned, tmp_path, monkeypatch, capfd):
    import sys

    from wandapp import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["wandapp", "recover", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capfd.readouterr()

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    code, text, errors = call(
        pruned(), "--out", tmp_path / "out", *flags, "--eval-text", "pydoc", "--eval-windows", 2, "--json"
    )
    assert code == 0, errors
    assert json.loads(text)["after"].keys() == {"held-out", "pydoc"} and "step 6/6" in errors

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("wandapp.recovery.train", interrupt)
    code, _, errors = call(pruned(), "--out", tmp_path / "two", *flags)
    assert code == 3 and "--resume" in errors
    code, _, errors = call(pruned(), "--out", tmp_path / "two", *flags, "--rank", "none")
    assert code == 2 and "rank" in errors
