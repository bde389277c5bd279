"""The command under torchrun: one voice, one output, the end of a job whose rank was killed, and its resumption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wandapp

pytestmark = pytest.mark.slow
OPTIONS = ["--calibration", "pydoc", "--samples", "12", "--seq-len", "64", "--method", "wanda++", "--ro-rounds", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "llama"
    wandapp.save_pruned(tiny_model("llama", num_hidden_layers=8)[0], tiny_tokenizer(), folder, files={})
    return folder


def start(ranks: int, checkpoint: Path, out: Path, *more: str, restarts: int = 0) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launcher += ["--max-restarts", str(restarts), "-m", "wandapp"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*launcher, "prune", str(checkpoint), "--out", str(out), *OPTIONS, "--json", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_blocks(job: subprocess.Popen, partial: Path, blocks: int) -> None:
    deadline = time.monotonic() + 200
    while len(list(partial.glob("model-*.safetensors"))) < blocks:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
        time.sleep(0.02)


def process_of(rank: int, launcher: int) -> int:
    """Process number of a rank, a child of torchrun's."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            variables = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(status.parent.name)
    raise AssertionError(f"torchrun {launcher} has no rank {rank}")


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, checkpoint) -> Path:
    """What two ranks write, after a check that they speak with one voice."""
    out = tmp_path_factory.mktemp("whole") / "out"
    job = start(2, checkpoint, out)
    printed, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert len(printed.splitlines()) == 1 and json.loads(printed)["ranks"] == 2
    assert said.count("block 8/8") == 1
    return out


def test_two_ranks_write_one_checkpoint_that_verifies(uninterrupted):
    verify = [sys.executable, "-m", "wandapp", "verify", str(uninterrupted)]
    assert subprocess.run(verify, timeout=120, capture_output=True).returncode == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_mid_run_ends_the_job_within_a_minute_and_it_resumes(tmp_path, checkpoint, uninterrupted, rank):
    out = tmp_path / "out"
    job = start(2, checkpoint, out)
    wait_for_blocks(job, tmp_path / "out.partial", 3)
    os.kill(process_of(rank, job.pid), signal.SIGKILL)
    killed = time.monotonic()
    _, said = job.communicate(timeout=100)
    assert job.returncode != 0 and time.monotonic() - killed < 60
    assert not out.exists()
    resumed = start(2, checkpoint, out, "--resume")
    printed, said = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert "blocks were finished by an earlier run" in said
    assert weights(out) == weights(uninterrupted)


def test_torchrun_restarts_a_job_that_resumes_by_itself(tmp_path, checkpoint, uninterrupted):
    job = start(2, checkpoint, tmp_path / "out", "--resume", restarts=1)
    wait_for_blocks(job, tmp_path / "out.partial", 2)
    os.kill(process_of(1, job.pid), signal.SIGKILL)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert "blocks were finished by an earlier run" in said
    assert weights(tmp_path / "out") == weights(uninterrupted)


def test_an_interrupted_job_says_once_how_to_go_on(tmp_path, checkpoint):
    job = start(2, checkpoint, tmp_path / "out")
    wait_for_blocks(job, tmp_path / "out.partial", 2)
    job.send_signal(signal.SIGINT)  # torchrun passes it on as SIGTERM
    _, said = job.communicate(timeout=100)
    assert job.returncode != 0 and not (tmp_path / "out").exists()
    told = [line for line in said.splitlines() if line.startswith("wandapp: ")]
    assert len(told) == 1 and "torchrun --nproc-per-node 2 -m wandapp prune --config" in told[0], said


def test_streamed_blocks_give_the_same_bits(tmp_path, checkpoint, uninterrupted):
    job = start(2, checkpoint, tmp_path / "out", "--stream", "--activations", "disk")
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert weights(tmp_path / "out") == weights(uninterrupted)


def test_an_error_before_the_ranks_meet_is_said_once(tmp_path, checkpoint):
    job = start(2, checkpoint, tmp_path / "out", "--sparsity", "7:4")
    printed, said = job.communicate(timeout=200)
    assert job.returncode != 0 and printed == ""
    assert sum(line.startswith("wandapp: ") for line in said.splitlines()) == 1
