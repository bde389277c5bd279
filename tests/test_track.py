"""Trackers by name, told every block and every step; nothing of them without being asked for."""

import json
import sys
import types

import pytest

from wandapp import WandappError
from wandapp.track import tracking

SMALL = ("--calibration", "pydoc", "--samples", "2", "--seq-len", "16")


def call(monkeypatch, capfd, *arguments):
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package wandb that notes what it is told."""
    told = types.SimpleNamespace(config=None, figures=[], finished=False)

    def init(project, dir, config):
        told.config = config
        return types.SimpleNamespace(
            log=lambda figures, step: told.figures.append((step, figures)),
            finish=lambda: setattr(told, "finished", True),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return told


def test_prune_tells_every_tracker_every_block(pruned_checkpoint, tmp_path, wandb, monkeypatch, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder = pruned_checkpoint("llama", "2:4")
    trackers = ("--track", "tensorboard", "--track", "wandb")
    code, _, errors = call(monkeypatch, capfd, "prune", folder, "--out", tmp_path / "out", *SMALL, *trackers)
    assert code == 0, errors
    report = json.loads((tmp_path / "out/wandapp/report.json").read_text())
    errors = [block["error"] for block in report["blocks"]]
    events = EventAccumulator(str(tmp_path / "out.track/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("error")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("error")] == pytest.approx(errors, rel=1e-6)
    assert {"sparsity", "mean_layer_error", "seconds", "peak_gib"} <= set(events.Tags()["scalars"])
    assert [figures["error"] for _, figures in wandb.figures] == errors and wandb.finished
    assert wandb.config["method"] == "wanda"
    for lines in ("out.track/figures.jsonl", "out/wandapp/blocks.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / lines).read_text().splitlines()]
        assert [(row["step"], row["error"]) for row in rows] == list(enumerate(errors, start=1))


def test_recover_tells_the_loss_of_every_step(pruned_checkpoint, tmp_path, wandb, monkeypatch, capfd):
    _, folder = pruned_checkpoint("llama", "2:4")
    text = ("--text", "pydoc", "--samples", "3", "--held-out", "1", "--seq-len", "16")
    code, _, errors = call(monkeypatch, capfd, "recover", folder, "--out", tmp_path / "out", *text, "--track", "wandb")
    assert code == 0, errors
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/wandapp/recover-loss.jsonl").open()]
    assert [(step, figures["loss"]) for step, figures in wandb.figures] == list(enumerate(losses, start=1))


def test_without_a_tracker_nothing_is_written(tmp_path):
    with tracking(("none",), tmp_path / "out", {}) as log:
        log(1, {"error": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_missing_trackers_are_refused(tmp_path, monkeypatch, capfd):
    code, _, errors = call(monkeypatch, capfd, "prune", "smollm2", "--out", tmp_path / "out", "--track", "tensorbord")
    assert code == 2 and "no such tracker; did you mean 'tensorboard'?" in errors
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        WandappError, match=r"--track wandb needs wandb; install it with: pip install 'wandapp\[wandb\]'"
    ):
        with tracking(("wandb",), tmp_path / "out", {}):
            pass
