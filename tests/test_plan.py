"""`wandapp prune --plan`: what it says beside what a run takes, and how it is said. Memory is tested in test_large.py."""

import copy
import json
import sys

import pytest
import torch

from wandapp import save_pruned
from wandapp.config import PruneConfig
from wandapp.errors import WandappError
from wandapp.pipeline import prune
from wandapp.plan import plan_run

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
