"""`wandapp eval`: several texts, the dense model beside, figures kept in the checkpoint's card."""

import json
import shutil
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from wandapp import save_pruned

FLAGS = ("--seq-len", "32", "--windows", "2")


@pytest.fixture
def checkpoint(pruned_checkpoint, tiny_model, tiny_tokenizer, tmp_path):
    """A 2:4 checkpoint whose recipe names its dense model."""
    save_pruned(tiny_model("llama")[0], tiny_tokenizer(), tmp_path / "dense", files={})
    shutil.copytree(pruned_checkpoint("llama", "2:4")[1], tmp_path / "pruned")
    recipe = f"model: {tmp_path / 'dense'}\nsparsity: '2:4'\n"
    (tmp_path / "pruned" / "wandapp" / "recipe.yaml").write_text(recipe)
    return tmp_path / "pruned"


def call(monkeypatch, capfd, *arguments):
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


def test_dense_model_of_the_recipe_is_measured_beside(checkpoint, tmp_path, monkeypatch, capfd):
    (tmp_path / "a.txt").write_text("A text of some length, to be measured. " * 20)
    texts = ("--text", "pydoc", "--text", tmp_path / "a.txt")
    code, out, errors = call(monkeypatch, capfd, checkpoint, *texts, *FLAGS, "--dense", "--json")
    assert code == 0, errors
    found = json.loads(out)
    assert found["dense"]["model"].endswith("dense") and found["model"].endswith("pruned")
    for measured in (found, found["dense"]):
        assert [result["windows"] for result in measured["perplexities"]] == [2, 2]
    here, there = found["perplexities"][0], found["dense"]["perplexities"][0]
    assert here["tokens_sha256"] == there["tokens_sha256"] and here["perplexity"] != there["perplexity"]
    assert found["perplexity"] == here["perplexity"] and {"wandapp", "torch"} <= found["versions"].keys()


def test_saved_figures_are_in_the_card(checkpoint, monkeypatch, capfd):
    for _ in range(2):  # the second replaces the first
        assert call(monkeypatch, capfd, checkpoint, "--text", "pydoc", *FLAGS, "--save")[0] == 0
    assert len((checkpoint / "wandapp" / "eval.jsonl").read_text().splitlines()) == 2
    card = ModelCard((checkpoint / "README.md").read_text())
    (result,) = card.data.eval_results
    assert result.metric_type == "perplexity" and "context 32, 2 windows" in result.metric_name
    assert card.data.library_name == "transformers" and card.data.get("base_model") is None
    assert f"| {result.metric_value:.2f} |" in card.text
    assert yaml.safe_load(card.content.split("---")[1])["sparsity"] == "2:4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dense",), "no wandapp/recipe.yaml names its dense model; give it with --dense-model"),
        (("--text", "pydoc", *FLAGS, "--save"), "--save keeps figures beside a checkpoint that wandapp wrote"),
    ],
)
def test_what_needs_a_recipe_says_so(arguments, message, checkpoint, monkeypatch, capfd):
    code, _, errors = call(monkeypatch, capfd, checkpoint.with_name("dense"), *arguments)
    assert code == 2 and message in errors


class Results:
    """What lm-eval's runner gives back (tests/test_tasks.py runs the real one)."""

    def __init__(self, accuracy: float):
        self.accuracy = accuracy

    def to_dict(self) -> dict:
        metrics = {"acc": self.accuracy, "acc_stderr": 0.01, "brier_score": 0.3}
        other = {"f1": self.accuracy / 2}
        common = {"num_fewshot": 0, "samples": 4, "version": "1.0", "task_sha256": None}
        tasks = [{"task": "colours", "metrics": metrics} | common, {"task": "numbers", "metrics": other} | common]
        return {"tasks": tasks, "mean_accuracy": self.accuracy, "limit": 4.0}


def test_tasks_stand_in_one_table_with_the_dense_model_s_beside(checkpoint, monkeypatch, capfd):
    accuracies = iter([0.25, 0.75])
    monkeypatch.setattr("wandapp.evaluation._lm_eval", lambda: lambda *_, **__: Results(next(accuracies)))
    code, text, errors = call(monkeypatch, capfd, checkpoint, "--tasks", "colours,numbers", "--dense", "--limit", 4)
    assert code == 0, errors
    lines = [line.split() for line in text.splitlines()]
    heads = ["task", "acc", "f1", "dense", "acc", "dense", "f1", "shots", "documents"]
    assert lines[0] == heads and "perplexity" not in text
    assert lines[1] == ["colours", "0.2500", "±", "0.0100", "-", "0.7500", "±", "0.0100", "-", "0", "4"]
    assert lines[2] == ["numbers", "-", "0.1250", "-", "0.3750", "0", "4"]
    assert "mean acc 0.2500 (dense 0.7500)" in text and "not all documents" in errors


def test_tasks_without_lm_eval_say_what_to_install(checkpoint, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandapp.tasks", None)
    code, _, errors = call(monkeypatch, capfd, checkpoint, "--tasks", "boolq")
    assert code == 2 and "pip install 'wandapp[eval]'" in errors
