"""Sweeps: which jobs a file means, what jobs share, and that one job's failure or death is its own affair."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from wandapp import WandappError, load_model, save_pruned
from wandapp.console import Output
from wandapp.sweep import Results, Sweep, state
from wandapp.sweep_run import run_job

TINY = {"models": ["tiny"], "calibration": "pydoc", "samples": 4, "seq_len": 32}
EVALUATE = {"text": "pydoc", "seq_len": 32, "windows": 2}


@pytest.fixture
def place(tiny_model, tiny_tokenizer, tmp_path, monkeypatch) -> Path:
    """The current directory, with a checkpoint `tiny`."""
    save_pruned(tiny_model("llama")[0], tiny_tokenizer(), tmp_path / "tiny", files={})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def sweep_of(**keys) -> Sweep:
    Path("sweep.yaml").write_text(yaml.safe_dump({"out": "runs"} | keys))
    return Sweep("sweep.yaml")


def recipes(sweep: Sweep) -> list[tuple]:
    return [(job.recipe.method, job.recipe.sparsity, job.recipe.seed) for job in sweep.jobs]


def test_every_combination_is_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(models=["a", "b"], methods=["wanda", "rgs"], patterns=["2:4", "50%"], seeds=[0, 1], alpha=[1, 10])
    assert len(sweep.jobs) == 2 * 2 * 2 * 2 * 2
    assert len({job.key for job in sweep.jobs}) == len({job.name for job in sweep.jobs}) == 32


def test_plural_keys_and_options_are_the_same_thing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plural = sweep_of(models=["a"], methods=["wanda"], patterns=["2:4"], seeds=[3])
    assert plural.jobs == sweep_of(model="a", method="wanda", sparsity="2:4", seed=3).jobs


def test_excluded_combinations_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    axes = {"models": ["a"], "methods": ["wanda", "gblm"], "patterns": ["2:4", "0.5"], "seeds": [0, 1]}
    sweep = sweep_of(**axes, exclude=[{"method": "gblm", "patterns": ["50%"]}, {"seed": 1, "method": "wanda"}])
    expected = [("wanda", "2:4", 0), ("wanda", "0.5", 0), ("gblm", "2:4", 0), ("gblm", "2:4", 1)]
    assert recipes(sweep) == expected


def test_a_job_keeps_its_key_when_values_are_added(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sweep_of(models=["a"], methods=["wanda"], seeds=[0]).jobs[0]
    after = sweep_of(models=["z", "a"], methods=["rgs", "wanda"], seeds=[5, 0]).jobs
    assert before.key in {job.key for job in after}
    assert before.key != sweep_of(models=["a"], methods=["wanda"], seeds=[0], damping=0.02).jobs[0].key


def test_values_that_mean_the_same_make_one_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(sweep_of(models=["a"], patterns=["0.5", "50%", "2:4"], seed=[0, "0"]).jobs) == 2


def test_skip_is_one_list_or_a_list_of_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [job.recipe.skip for job in sweep_of(models=["a"], skip=["x", "y"]).jobs] == [("x", "y")]
    assert [job.recipe.skip for job in sweep_of(models=["a"], skip=[["x"], []]).jobs] == [("x",), ()]


def test_dense_evaluation_happens_once_per_model_and_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    axes = {"models": ["a", "b"], "seeds": [0, 1], "dtype": ["float32", "bfloat16"]}
    dense = [job for job in sweep_of(**axes, evaluate=EVALUATE).jobs if job.is_dense]
    assert len(dense) == 4
    assert [job.kind for job in sweep_of(**axes).jobs] == ["prune"] * 8


# Doing jobs ---------------------------------------------------------------------------------------------------------


def test_a_job_leaves_a_checkpoint_and_one_line(place):
    sweep = sweep_of(**TINY, evaluate=EVALUATE)
    dense, job = sweep.jobs
    run_job(sweep, dense, Output())
    row = run_job(sweep, job, Output())
    lines = [json.loads(line) for line in sweep.results.path.read_text().splitlines()]
    assert [line["key"] for line in lines] == [dense.key, job.key] and lines[1] == row
    assert row["report"]["sparsity"] == 0.5 and row["evaluation"]["windows"] == 2
    assert lines[0]["evaluation"]["perplexity"] != row["evaluation"]["perplexity"]
    assert (sweep.folder(job) / "wandapp" / "recipe.yaml").is_file()
    assert run_job(sweep, job, Output()) == row and len(sweep.results.path.read_text().splitlines()) == 2


def test_shared_tokens_change_neither_result_nor_provenance(place):
    shared = sweep_of(**TINY, methods=["wanda", "magnitude"])
    with_others = run_job(shared, shared.jobs[0], Output())["report"]
    alone = sweep_of(**TINY | {"out": "alone"}, methods=["wanda"])
    by_itself = run_job(alone, alone.jobs[0], Output())["report"]
    assert with_others["calibration_sha256"] == by_itself["calibration_sha256"]
    assert (
        "runs/shared/tokens-" in with_others["calibration"] and by_itself["calibration"] in with_others["calibration"]
    )
    left, right = (load_model(sweep.folder(sweep.jobs[0])).model.state_dict() for sweep in (shared, alone))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not Path("alone/shared").exists()


def test_a_failed_job_leaves_its_sentence(place):
    sweep = sweep_of(**TINY | {"models": ["./gone"]})
    with pytest.raises(WandappError, match="gone: no such folder"):
        run_job(sweep, sweep.jobs[0], Output())
    rows, _ = sweep.results.read()
    assert state(sweep.jobs[0], rows) == "failed" and "no such folder" in rows[sweep.jobs[0].key]["error"]


def _append(path: Path, writer: int) -> None:
    for number in range(50):
        Results(path).append({"key": f"{writer}-{number}", "text": "x" * 5000})


def test_lines_of_many_processes_stay_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    writers = [multiprocessing.get_context("fork").Process(target=_append, args=(path, index)) for index in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows, unreadable = Results(path).read()
    assert len(rows) == 200 and unreadable == 0


def test_a_torn_line_costs_only_itself(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.append({"key": "a", "status": "done"})
    with open(results.path, "ab") as file:
        file.write(b'{"key": "b", "sta')
    results.append({"key": "c", "status": "done"})
    rows, unreadable = results.read()
    assert set(rows) == {"a", "c"} and unreadable == 1


# The command --------------------------------------------------------------------------------------------------------


def wandapp(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "wandapp", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(monkeypatch, capfd, *arguments: str) -> tuple[int, str, str]:
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


def test_dry_run_and_count_start_nothing(place, monkeypatch, capfd):
    sweep_of(**TINY, seeds=[0, 1])
    code, text, _ = call(monkeypatch, capfd, "sweep", "sweep.yaml", "--dry-run", "--json")
    assert code == 0 and [job["state"] for job in json.loads(text)["jobs"]] == ["pending", "pending"]
    assert call(monkeypatch, capfd, "sweep", "sweep.yaml", "--count")[:2] == (0, "2\n")
    assert call(monkeypatch, capfd, "sweep", "sweep.yaml", "--job", "2")[0] == 2
    assert not Path("runs").exists()


@pytest.mark.slow
def test_jobs_fail_alone_and_finished_ones_are_skipped(place):
    sweep = sweep_of(**TINY | {"models": ["tiny", "./gone"]}, methods=["magnitude"])
    first = wandapp("sweep", "sweep.yaml", "--workers", "2", "--json")
    text, said = first.communicate(timeout=300)
    result = json.loads(text.splitlines()[-1])
    assert first.returncode == 1 and (result["done"], len(result["failed"])) == (1, 1)
    failed = result["failed"][0]
    assert "gone: no such folder" in failed["error"] and "gone: no such folder" in Path(failed["log"]).read_text()
    (place / "gone").symlink_to("tiny")
    second = wandapp("sweep", "sweep.yaml", "--json")
    result = json.loads(second.communicate(timeout=300)[0])
    assert second.returncode == 0 and (result["done_before"], result["done"]) == (1, 1)
    assert {state(job, sweep.results.read()[0]) for job in sweep.jobs} == {"done"}


def running_in(folder: Path) -> list[str]:
    """Other processes that work in `folder`: each test has its own, so another test's jobs do not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cwd").resolve() == folder and int(process.name) != os.getpid():
                found.append(process.joinpath("cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended while we looked
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_stops_its_jobs_and_goes_on_later(place, number):
    sweep = sweep_of(**TINY | {"calibration": "self", "samples": 64, "seq_len": 256})
    run = wandapp("sweep", "sweep.yaml")
    deadline = time.monotonic() + 120
    while not sweep.log(sweep.jobs[0]).exists() or "loading" not in sweep.log(sweep.jobs[0]).read_text():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    _, said = run.communicate(timeout=200)
    assert run.returncode == 3 and "0 of 1 jobs are done, go on with: wandapp sweep sweep.yaml" in said
    assert "Traceback" not in said and not sweep.folder(sweep.jobs[0]).exists()
    assert not running_in(sweep.out.parent.resolve())


@pytest.mark.slow
def test_the_same_list_runs_as_ray_tasks(place):
    pytest.importorskip("ray", reason="needs the extra: pip install 'wandapp[ray]'")
    sweep = sweep_of(**TINY, methods=["magnitude"])
    script = Path(__file__).parents[1] / "examples" / "ray_sweep.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script, "sweep.yaml"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert {state(job, sweep.results.read()[0]) for job in sweep.jobs} == {"done"}
