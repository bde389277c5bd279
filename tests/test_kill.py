"""kill -9 at random moments, and at every rename and flush: the run that goes on gives the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wandapp import save_pruned

RUNS = [
    ("wanda", False, {}),
    ("sparsegpt", True, {}),
    ("wanda++", True, {"ro_rounds": 2, "ro_samples": 4}),
    ("gblm", True, {}),
    ("sparsegpt+ro", False, {"ro_rounds": 1, "ro_samples": 4}),
]

# A process that has everything imported and forks one child per run: so a kill costs no start of Python and torch.
SERVER = '''
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from wandapp.config import PruneConfig
from wandapp.job import prune_checkpoint
from wandapp.packing import pack_checkpoint
import wandapp.gguf_source, wandapp.kernels.select.cpu, wandapp.kernels.compensate.cpu  # before the fork

task = json.loads(sys.argv[1])

def work(out):
    if "pack" in task:
        pack_checkpoint(task["pack"], out)
    else:
        prune_checkpoint(PruneConfig(**task["recipe"], out=out), resume=True)

def run(out, kill_at=None):
    """Process id of a child that works; it kills itself at its kill_at-th flush or rename."""
    child = os.fork()
    if child:
        return child
    if kill_at is not None:
        seen = 0
        def dying(call):
            def counted(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return counted
        os.fsync, os.rename, os.unlink = dying(os.fsync), dying(os.rename), dying(os.unlink)
    code = 9
    try:
        work(out)
        code = 0
    finally:
        os._exit(code)

def wait(child):
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
    return "done"

root, kills = Path(task["root"]), 0
start = time.monotonic()
assert wait(run(str(root / "reference"))) == "done"
seconds = time.monotonic() - start
rng = random.Random(task["seed"])
bad = []

def compare(out, how):
    global bad
    for path in sorted((root / "reference").rglob("*")):
        other = Path(out) / path.relative_to(root / "reference")
        if path.is_dir() or path.name in ("report.json", "README.md", "recipe.yaml"):
            continue
        if not other.exists() or path.read_bytes() != other.read_bytes():
            bad.append(f"{how}: {other}")
    leftovers = [p.name for p in Path(out).parent.iterdir() if p.name not in ("reference", Path(out).name)]
    lock = "" if "pack" in task else "lock"
    leftovers += [str(p) for p in Path(out).rglob("*") if p.name == lock or "unfinished" in p.name or "scratch" in p.name]
    if leftovers:
        bad.append(f"{how}: left {leftovers}")
    shutil.rmtree(out)

for number in range(task["random_runs"]):
    out = str(root / "out")
    while True:
        child = run(out)
        time.sleep(rng.uniform(0, 1.1 * seconds))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if wait(child) == "done":
            break
        kills += 1
        if "pack" in task and Path(out).exists():  # whole, or compare will tell
            break
    compare(out, f"random run {number}")

point = 0
while task["every_point"]:
    point += 1
    out = str(root / "out")
    if wait(run(out, kill_at=point)) == "done":
        compare(out, f"no point {point}")
        break
    kills += 1
    if "pack" not in task or not Path(out).exists():
        assert wait(run(out)) == "done"
    compare(out, f"point {point}")
print(json.dumps({"kills": kills, "bad": bad, "points": point}))
'''


def serve(tmp_path, tiny_model, tiny_tokenizer, method, stream, options, **task) -> dict:
    save_pruned(tiny_model("llama")[0].to(torch.bfloat16), tiny_tokenizer(), tmp_path / "dense", files={})
    tokens = torch.randint(0, 250, (8, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    recipe = {"model": str(tmp_path / "dense"), "calibration": str(tmp_path / "tokens.safetensors"), "batch_size": 2}
    (tmp_path / "runs").mkdir()
    return start_server({"recipe": recipe | {"method": method, "stream": stream, **options}}, tmp_path / "runs", **task)


def start_server(what: dict, root: Path, **task) -> dict:
    given = what | {"root": str(root), "seed": 0, "random_runs": 0, "every_point": False} | task
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVER, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stream", "options"), RUNS)
def test_killed_at_random_moments_a_run_goes_on_to_the_same_bytes(
    method, stream, options, tmp_path, tiny_model, tiny_tokenizer
):
    result = serve(tmp_path, tiny_model, tiny_tokenizer, method, stream, options, random_runs=5)
    assert result["kills"] >= 5 and not result["bad"], result


@pytest.mark.slow
def test_killed_at_every_flush_and_rename_a_run_goes_on_to_the_same_bytes(tmp_path, tiny_model, tiny_tokenizer):
    result = serve(tmp_path, tiny_model, tiny_tokenizer, "wanda", True, {}, every_point=True)
    assert result["kills"] == result["points"] - 1 >= 20 and not result["bad"], result


@pytest.mark.slow
def test_killed_at_any_moment_packing_leaves_nothing_half_written(tmp_path, pruned_checkpoint):
    """The output is absent or whole, and a second run makes it whole.

    A kill between the last rename and the end leaves an empty wandapp/lock in it, which nobody holds.
    """
    (tmp_path / "runs").mkdir()
    source = {"pack": str(pruned_checkpoint("llama", "2:4")[1])}
    result = start_server(source, tmp_path / "runs", random_runs=20, every_point=True)
    assert result["kills"] >= 20 and result["points"] > 10 and not result["bad"], result
