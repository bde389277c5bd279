"""lm-eval's tasks on dense and packed models, from local files; the papers' lists; what is said without a network."""

import json

import pytest
import torch

from wandapp import WandappError, load_sparse, pack_checkpoint
from wandapp.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow  # importing lm-eval and reading its list of tasks takes seconds
DOCUMENTS = [
    {"question": "The sky is", "choices": [" blue", " a green one"], "answer": 0},
    {"question": "Grass is", "choices": [" blue", " a green one"], "answer": 1},
    {"question": "Snow is", "choices": [" white as a sheet", " black"], "answer": 0},
    {"question": "Coal is", "choices": [" white", " black", " red"], "answer": 1},
]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Folder with the multiple-choice task `colours` and its data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    (folder / "colours.yaml").write_text(f"""
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "colours.jsonl"}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
""")
    return folder


@torch.no_grad()
def log_probability(model, tokenizer, context: str, continuation: str) -> float:
    """Of the continuation after the context, token by token in float64."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[position - 1, ids[position]]) for position in range(start, len(ids)))


def test_accuracy_is_that_of_the_likeliest_choice(colours, tiny_model, tiny_tokenizer):
    from wandapp.tasks import evaluate_tasks

    model, tokenizer = tiny_model("llama")[0], tiny_tokenizer()
    progress = []
    results = evaluate_tasks(
        model, tokenizer, [str(colours)], batch_size=2, on_progress=lambda *counts: progress.append(counts)
    )
    hits = normed_hits = 0
    for row in DOCUMENTS:
        scores = [log_probability(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        normed = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        hits += scores.index(max(scores)) == row["answer"]
        normed_hits += normed.index(max(normed)) == row["answer"]
    (task,) = results.tasks
    assert (task.metrics["acc"], task.metrics["acc_norm"]) == (hits / 4, normed_hits / 4)
    assert (task.task, task.samples, task.num_fewshot, task.version) == ("colours", 4, 0, "1.0")
    variance = (hits / 4) * (1 - hits / 4) / 3  # of the mean of four, by the sample's own
    assert task.metrics["acc_stderr"] == pytest.approx(variance**0.5)
    assert results.mean_accuracy == hits / 4 and results.dtype == "float32" and len(task.task_sha256) == 64
    assert progress[-1] == (9, 9)


def test_packed_model_answers_as_the_dense_one(colours, pruned_checkpoint, tmp_path):
    from wandapp.tasks import evaluate_tasks

    model, folder = pruned_checkpoint("llama", "2:4")
    pack_checkpoint(folder, tmp_path / "packed")
    options = dict(names=[str(colours / "colours.yaml")], num_fewshot=1, limit=3)
    dense = evaluate_tasks(model, load_tokenizer(folder), **options)
    packed = evaluate_tasks(load_sparse(tmp_path / "packed"), load_tokenizer(folder), **options)
    assert dense.tasks == packed.tasks
    assert (packed.tasks[0].num_fewshot, packed.tasks[0].samples, packed.limit) == (1, 3, 3)


def test_a_file_is_that_file_alone(colours, tmp_path):
    from wandapp.tasks import _expand

    text = (colours / "colours.yaml").read_text()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "colours.yaml").write_text(text)
    (tmp_path / "deeper" / "colours.yaml").write_text(text.replace("task: colours", "task: others"))
    assert _expand([str(tmp_path / "colours.yaml")], None)[0] == {None: ["colours"]}


def test_a_task_is_not_asked_for_in_two_ways(colours, monkeypatch, tiny_model, tiny_tokenizer):
    from wandapp import tasks

    monkeypatch.setitem(tasks.PRESETS, "two", tasks.Preset(("colours",), 2))
    model, tokenizer = tiny_model("llama")[0], tiny_tokenizer()
    with pytest.raises(WandappError, match="'colours' is asked for with .* examples in the prompt; evaluate it twice"):
        tasks.evaluate_tasks(model, tokenizer, ["two", str(colours)])
    results = tasks.evaluate_tasks(model, tokenizer, ["two", str(colours)], num_fewshot=1, limit=1)
    assert [task.num_fewshot for task in results.tasks] == [1] and "acc_stderr" not in results.tasks[0].metrics
    with pytest.raises(WandappError, match="limit must be above 0, got 0"):
        tasks.evaluate_tasks(model, tokenizer, [str(colours)], limit=0)


def test_presets_are_tasks_of_lm_eval():
    from lm_eval.tasks import TaskManager

    from wandapp.tasks import PRESETS, _expand

    known = TaskManager().task_index
    assert {name for preset in PRESETS.values() for name in preset.tasks} <= known.keys()
    assert [len(preset.tasks) for preset in PRESETS.values()] == [7, 9, 1]
    assert _expand(["mmlu5", "gsm8k"], None)[0] == {5: ["mmlu"], None: ["gsm8k"]}
    assert _expand(["wanda7", "mmlu5"], None)[0] == {0: list(PRESETS["wanda7"].tasks), 5: ["mmlu"]}
    assert _expand(["wanda7"], 3)[0] == {3: list(PRESETS["wanda7"].tasks)}


def test_what_is_missing_is_said_in_one_sentence(colours, tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    import datasets

    from wandapp.tasks import evaluate_tasks

    model, tokenizer = tiny_model("llama")[0], tiny_tokenizer()
    with pytest.raises(WandappError, match="task 'boolqq' is neither a preset .* did you mean 'boolq'"):
        evaluate_tasks(model, tokenizer, ["boolqq"])
    with pytest.raises(WandappError, match="no such task file"):
        evaluate_tasks(model, tokenizer, [str(tmp_path / "none.yaml")])
    (tmp_path / "empty.yaml").write_text("a: 1\n")
    with pytest.raises(WandappError, match="holds no task of lm-eval"):
        evaluate_tasks(model, tokenizer, [str(tmp_path / "empty.yaml")])
    (tmp_path / "bare.yaml").write_text("task: bare\n")
    with pytest.raises(WandappError, match="tasks bare: lm-eval cannot use the definition"):
        evaluate_tasks(model, tokenizer, [str(tmp_path / "bare.yaml")])
    misfit = (colours / "colours.yaml").read_text().replace("{{choices}}", "{{options}}")
    (tmp_path / "misfit").mkdir()
    (tmp_path / "misfit" / "misfit.yaml").write_text(misfit)
    with pytest.raises(WandappError, match="tasks colours: .*'options' is undefined.*check the"):
        evaluate_tasks(model, tokenizer, [str(tmp_path / "misfit")])
    with pytest.raises(WandappError, match="tasks need a tokenizer"):
        evaluate_tasks(model, None, ["boolq"])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", _unreachable)
    with pytest.raises(WandappError, match=r"tasks rte: their data cannot be had \(no route.*connect once"):
        evaluate_tasks(model, tokenizer, ["rte"])


def _unreachable(*arguments, **options):
    raise ConnectionError("no route to the hub")


def test_command_with_the_dense_model_beside(colours, pruned_checkpoint, tmp_path, monkeypatch, capfd):
    import sys

    from wandapp import cli

    _, folder = pruned_checkpoint("llama", "2:4")
    arguments = ["eval", folder, "--tasks", colours / "colours.yaml", "--dense-model", folder]
    monkeypatch.setattr(sys, "argv", ["wandapp", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, errors = capfd.readouterr()
    assert not caught.value.code, errors
    found = json.loads(out)
    assert found["tasks"] == found["dense"]["tasks"] and found["perplexities"] == [] and found["versions"]["lm-eval"]
    assert "mean acc" in errors and "dense acc_norm" in errors
