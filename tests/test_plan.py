"""`wandapp prune --plan`: what it says beside what a run takes, and how it is said. Memory is tested in test_large.py."""

import copy
import json
import sys

import pytest
import torch
from transformers import AutoConfig

from wandapp import save_pruned
from wandapp.calibration import save_tokens
from wandapp.config import PruneConfig
from wandapp.errors import WandappError
from wandapp.pipeline import prune
from wandapp.plan import plan_run
from wandapp.store import attention_flops_per_token, query_heads

SAMPLES, SEQ_LEN = 4, 32


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    model = tiny_model("llama")[0]
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    save_pruned(model, None, folder, files={})
    return model, folder


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "rgs"},
        {"method": "sparsegpt"},
        {"method": "wanda++", "ro_rounds": 1, "ro_samples": 2},
        {"method": "gblm"},
        {"method": "wanda", "sparsity": "0.5", "allocate": "error"},
        {"method": "wanda", "self_samples": 8},
        {"method": "wanda", "tune_passes": 2},
        {"method": "wanda+reconstruct"},
        {"method": "wanda+reconstruct", "reconstruct_region": "sub-block"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_planned_arithmetic_is_what_the_run_counts(options, checkpoint):
    """Within a fifth: blocks of 64 columns are small beside the estimate's round numbers."""
    model, folder = checkpoint
    plan = plan_run(PruneConfig(model=str(folder), samples=SAMPLES, seq_len=SEQ_LEN, calibration="pydoc", **options))
    tokens = torch.randint(0, 250, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    report = prune(copy.deepcopy(model), calibration=tokens, **options)
    within = 0.2 if "reconstruct_region" not in options else 0.05
    assert plan.flops == pytest.approx(report.flops, rel=within)


def test_any_number_of_samples_can_be_planned(checkpoint):
    plan = plan_run(PruneConfig(model=str(checkpoint[1]), samples=10**7, seq_len=2048, calibration="pydoc"))
    assert plan.samples == 10**7


def test_skipped_maps_run_but_are_not_pruned(checkpoint):
    model, folder = checkpoint
    options = {"method": "sparsegpt", "skip": ("mlp", r"layers\.0\.")}
    common = dict(model=str(folder), samples=SAMPLES, seq_len=SEQ_LEN, calibration="pydoc")
    plan, whole = plan_run(PruneConfig(**common, **options)), plan_run(PruneConfig(**common, method="sparsegpt"))
    assert plan.parts["method"] < whole.parts["method"] and plan.parts["weights"] == whole.parts["weights"]
    tokens = torch.randint(0, 250, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    report = prune(copy.deepcopy(model), calibration=tokens, **options)
    assert report.flops <= plan.flops * 1.2 < whole.flops * 1.2  # the first block has nothing to solve


def test_what_the_model_writes_is_planned_whoever_asked_for_it(checkpoint):
    _, folder = checkpoint
    common = dict(model=str(folder), samples=64, seq_len=SEQ_LEN)
    given, own = (plan_run(PruneConfig(**common, calibration=source)) for source in ("pydoc", "self"))
    more = plan_run(PruneConfig(**common | {"samples": 1}, calibration="pydoc", self_samples=63))
    assert own.flops > given.flops and own.samples == more.samples == 64
    assert own.peak_bytes == pytest.approx(more.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"skip": ("nosuch",)}, "matches no linear map"),
        ({"skip": (".",)}, "leaves no linear map to prune"),
        ({"sparsity": "1:3"}, "1:3"),
        ({"calibration": "self", "stream": True}, "'self' lets the whole model write"),
        ({"sparsity": 0.5, "method": "wanda-cumulative", "preset": "best"}, "which wanda-cumulative does not"),
    ],
)
def test_what_the_run_refuses_the_plan_does(options, told, checkpoint):
    with pytest.raises(WandappError, match=told):
        plan_run(PruneConfig(model=str(checkpoint[1]), **{"calibration": "pydoc"} | options))


def test_more_samples_than_a_token_file_has_are_not_planned(checkpoint, tmp_path):
    save_tokens(torch.zeros(4, 8, dtype=torch.int64), tmp_path / "four.safetensors")
    common = dict(model=str(checkpoint[1]), calibration=str(tmp_path / "four.safetensors"))
    assert plan_run(PruneConfig(**common)).samples == 4
    with pytest.raises(WandappError, match="holds 4 samples x 8 tokens, got --samples 9"):
        plan_run(PruneConfig(**common, samples=9))


@pytest.mark.parametrize("family", ["gpt_neo", "mpt", "gpt2", "llama"])
def test_heads_are_counted_under_whatever_name_a_family_gives_them(family):
    names = {"gpt_neo": ("num_heads", "hidden_size"), "mpt": ("n_heads", "d_model"), "gpt2": ("n_head", "n_embd")}
    heads, hidden = names.get(family, ("num_attention_heads", "hidden_size"))
    config = AutoConfig.for_model(family, **{heads: 4, hidden: 64})
    assert query_heads(config) == 4 and attention_flops_per_token(config, 10) == 4 * 10 * 64


def test_tuning_needs_logits_of_two_models(checkpoint):
    _, folder = checkpoint
    options = dict(model=str(folder), samples=SAMPLES, calibration="pydoc", method="wanda", seq_len=512, batch_size=1)
    plain, tuned = (plan_run(PruneConfig(**options, tune_passes=passes)) for passes in (0, 1))
    assert tuned.peak_bytes - plain.peak_bytes > 20 * 512 * 300


def test_streamed_blocks_need_two_blocks_and_states_on_disk_need_disk(checkpoint):
    model, folder = checkpoint
    common = {"model": str(folder), "samples": SAMPLES, "seq_len": SEQ_LEN, "calibration": "pydoc"}
    whole = plan_run(PruneConfig(**common))
    lean = plan_run(PruneConfig(**common, stream=True, activations="disk"))
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    everything = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert (whole.parts["weights"], lean.parts["weights"]) == (everything, 2 * block)
    hidden = SAMPLES * SEQ_LEN * model.config.hidden_size * 4
    assert (whole.disk_bytes, lean.disk_bytes) == (everything, everything + hidden)


def test_experts_that_a_token_does_not_reach_cost_nothing(tiny_model, tmp_path):
    for family in ("llama", "mixtral"):
        save_pruned(tiny_model(family)[0], None, tmp_path / family, files={})
    plans = [
        plan_run(PruneConfig(model=str(tmp_path / family), samples=SAMPLES, seq_len=SEQ_LEN, calibration="pydoc"))
        for family in ("llama", "mixtral")
    ]
    assert plans[1].parts["weights"] > 2.4 * plans[0].parts["weights"]  # four experts in the place of one
    assert plans[1].flops < 2.0 * plans[0].flops  # two of them are run


def call(monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", "prune", *map(str, arguments), "--plan"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


def test_command_says_the_plan_and_writes_nothing(checkpoint, tmp_path, monkeypatch, capfd):
    flags = ("--samples", SAMPLES, "--seq-len", SEQ_LEN, "--calibration", "pydoc", "--out", tmp_path / "out", "--json")
    code, text, said = call(monkeypatch, capfd, checkpoint[1], *flags)
    plan = json.loads(text)
    assert (code, plan["blocks"], plan["samples"]) == (0, 3, SAMPLES)
    assert sum(plan["parts"].values()) <= plan["peak_bytes"]
    assert all(name in said for name in ("peak memory", "hidden states", "disk", "of work")) and not list(
        tmp_path.iterdir()
    )


def test_plan_of_nothing_is_refused(monkeypatch, capfd):
    code, _, said = call(monkeypatch, capfd)
    assert code == 2 and "prune needs model" in said
    with pytest.raises(WandappError, match="no such folder"):
        plan_run(PruneConfig(model="./nothing/here"))
