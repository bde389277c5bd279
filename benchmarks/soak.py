"""Prune, pack, verify and unpack over and over, while processes are killed and disks fail at random moments.

    python benchmarks/soak.py --minutes 5

Every recipe is run once undisturbed; afterwards the same job is disturbed until it is done, and its bytes are compared:

    kill      SIGKILL after a random time
    fsize     no file may grow beyond a random size (RLIMIT_FSIZE): a write fails in the middle of a file
    full      the disk has room for a part of the output only (a small tmpfs; needs root, else left out)
    vanish    OUT.partial is deleted while the job runs
    stop      SIGINT: the job must exit with 3 and name the command that goes on

A job may fail when its disk does, with exit code 2 and one sentence; it must never end well with other bytes, end with a
traceback, or leave an output that looks complete and is not. Those are mismatches, and the figure for them must be 0.
A signal that comes behind the last rename leaves a complete output; its bytes are compared like any other's.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import wandapp.inference  # noqa: F401, what the forks would import
import wandapp.job  # noqa: F401
from wandapp import cli, save_pruned
from wandapp.console import Output
from wandapp.doctor import describe_machine, examine
from wandapp.errors import WandappError

BLOCKS, HIDDEN = 6, 256
TOKENS = 16, 128  # samples, seq_len
ROOM = 64 << 20  # of the small disk; a checkpoint is a quarter of that
RECIPES = {
    "wanda 2:4": {"method": "wanda", "sparsity": "2:4"},
    "sparsegpt 4:8": {"method": "sparsegpt", "sparsity": "4:8"},
    "wanda++ 2:4": {"method": "wanda++", "sparsity": "2:4", "ro_rounds": 2, "ro_samples": 4},
    "magnitude 0.5": {"method": "magnitude", "sparsity": "0.5"},
    "gblm 0.5": {"method": "gblm", "sparsity": "0.5"},
    "admm+reconstruct 2:4": {"method": "admm+reconstruct", "sparsity": "2:4", "reconstruct_passes": 1, "stream": True},
    "sparsegpt+ro 2:4, states on disk": {
        **{"method": "sparsegpt+ro", "sparsity": "2:4", "ro_rounds": 1, "ro_samples": 4},
        **{"stream": True, "activations": "disk"},
    },
    "wanda 2:4, permuted": {"method": "wanda", "sparsity": "2:4", "permute": True, "stream": True},
    "wanda 0.6, owl": {"method": "wanda", "sparsity": "0.6", "allocate": "owl", "activations": "disk"},
}
HARM = ("kill", "kill", "kill", "stop", "fsize", "fsize", "full", "vanish")
MAX_HARMED = 6  # times one job is disturbed before it is left in peace


class Soak:
    """The loop, its counts, and the bytes that each recipe must give."""

    def __init__(self, work: Path, minutes: float, seed: int):
        self.work, self.rng = work, random.Random(seed)
        self.minutes, self.deadline = minutes, 0.0
        self.counts: dict[str, Counter] = {name: Counter() for name in RECIPES}
        self.mismatches: list[str] = []
        self.expected: dict[str, str] = {}
        self.seconds: dict[tuple[str, str], float] = {}  # by recipe and command, undisturbed
        self.disk = self._small_disk()
        make_model(work / "model")

    def run(self) -> None:
        """Reference outputs first, then disturbed jobs, a recipe at a time, until the time is up."""
        for name in RECIPES:
            out, packed, dense = (
                self._folder(name) / part for part in ("reference", "reference-packed", "reference-dense")
            )
            for command in (self._prune_command(name, out), ["pack", out, packed], ["unpack", packed, dense]):
                start = time.monotonic()
                self._must(name, self._wandapp(command), 0)
                self.seconds[name, command[0]] = time.monotonic() - start
            self.expected[name] = digest(out)
            self._compare(name, dense)
        names = list(RECIPES)
        self.deadline = time.monotonic() + 60 * self.minutes
        while time.monotonic() < self.deadline:
            self._job(names[sum(count["jobs"] for count in self.counts.values()) % len(names)])

    def _job(self, name: str) -> None:
        """One disturbed prune, pack, verify and unpack, compared at each end."""
        count, folder = self.counts[name], self._folder(name)
        out, packed, dense = folder / "out", folder / "packed", folder / "dense"
        self._disturbed(name, out, lambda place: self._prune_command(name, place))
        self._compare(name, out)
        self._disturbed(name, packed, lambda place: ["pack", out, place])
        self._must(name, self._wandapp(["verify", packed]), 0)
        self._disturbed(name, dense, lambda place: ["unpack", packed, place])
        self._compare(name, dense)
        count["jobs"] += 1
        for path in (out, packed, dense):
            shutil.rmtree(path, ignore_errors=True)  # absent after a mismatch

    def _disturbed(self, name: str, out: Path, command) -> None:
        """Runs a command under random harm until it ends well; `out` appears only then."""
        for harm in [*self.rng.choices(HARM, k=self.rng.randrange(1, MAX_HARMED)), None]:
            if harm is None or time.monotonic() > self.deadline:
                self._must(name, self._wandapp(command(out)), 0)
                return
            if self._harmed(name, harm, out, command):
                return

    def _harmed(self, name: str, harm: str, out: Path, command) -> bool:
        """One run under `harm`; whether it ended well all the same."""
        count, delay = self.counts[name], self.rng.uniform(0.0, 1.1) * self.seconds[name, command(out)[0]]
        if harm == "full" and self.disk is None:
            count["full: left out"] += 1
            return False
        with self._place(harm, out) as place:
            limit = self.rng.choice([10, 1000, 30_000, 300_000, 1_000_000]) if harm == "fsize" else None
            run = self._start(command(place), limit)
            run.wait(delay if harm in ("kill", "stop", "vanish") else None)
            is_alive = run.code is None
            if is_alive:
                self._act(harm, run, place)
                run.wait(None)
            code = run.code
            self._judge(name, harm, code, run.said, place)
            count[harm] += is_alive or code != 0
            if code:
                count["resumed"] += Path(f"{place}.partial").exists()
            if code and harm == "full":  # room is made, and the same folder goes on
                (self.disk / "filler").unlink()
                self._must(name, self._wandapp(command(place)), 0)
            if place != out and place.exists():
                shutil.move(place, out)
        return out.exists()

    def _act(self, harm: str, run: "Command", place: Path) -> None:
        if harm == "kill":
            os.kill(run.pid, signal.SIGKILL)
        elif harm == "stop":
            os.kill(run.pid, signal.SIGINT)
        elif harm == "vanish":
            partial, gone = f"{place}.partial", f"{place}.gone"
            with contextlib.suppress(FileNotFoundError):  # not begun, or done
                os.rename(partial, gone)  # at once: a walk through it would go on in OUT after the job's own rename
                shutil.rmtree(gone)

    def _judge(self, name: str, harm: str, code: int, said: str, place: Path) -> None:
        """Every end that is not one of the allowed ones is a mismatch."""
        allowed = {"kill": {0, -9}, "stop": {0, 3}, "vanish": {0, 2}, "fsize": {0, 2}, "full": {0, 2}}[harm]
        if code not in allowed or "Traceback" in said:
            self._mismatch(name, f"{harm}: exit code {code}: {said[-600:]}")
        if code and place.exists() and harm not in ("kill", "stop"):
            self._mismatch(name, f"{harm}: {place} exists after exit code {code}")

    @contextlib.contextmanager
    def _place(self, harm: str, out: Path) -> Iterator[Path]:
        """Where the run writes: `out`, or the small disk with only a part of it free."""
        if harm != "full":
            yield out
            return
        with open(self.disk / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, ROOM - self.rng.randrange(1 << 16, ROOM // 4))
        try:
            yield self.disk / "out"
        finally:
            for path in self.disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _small_disk(self) -> Path | None:
        """A tmpfs of ROOM bytes, where one can be mounted."""
        disk = self.work / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "wandapp-soak", str(disk)]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run(mount, capture_output=True).returncode == 0:
                return disk
        return None

    def close(self) -> None:
        if self.disk:
            subprocess.run(["umount", str(self.disk)], check=True)

    def _folder(self, name: str) -> Path:
        folder = self.work / name.replace(" ", "-").replace(":", "of")
        folder.mkdir(exist_ok=True)
        return folder

    def _prune_command(self, name: str, out: Path) -> list:
        recipe = self._folder(name) / "recipe.yaml"
        samples, seq_len = TOKENS
        options = {"calibration": self.work / "ids.safetensors", "samples": samples, "seq_len": seq_len}
        lines = RECIPES[name] | options | {"model": self.work / "model"}
        recipe.write_text("".join(f"{key}: '{value}'\n" for key, value in lines.items()))
        return ["prune", "--config", recipe, "--out", out, "--resume"]

    def _start(self, arguments: list, file_bytes: int | None = None) -> "Command":
        return Command([str(argument) for argument in arguments], file_bytes)

    def _wandapp(self, arguments: list) -> "Command":
        command = self._start(arguments)
        command.wait(None)
        return command

    def _must(self, name: str, run: "Command", code: int) -> None:
        if run.code != code:
            self._mismatch(name, f"{run.arguments[0]}: exit code {run.code}, not {code}: {run.said[-600:]}")

    def _compare(self, name: str, folder: Path) -> None:
        found = digest(folder)
        if found != self.expected[name]:
            self._mismatch(name, f"{folder.name}: other tensors than in the undisturbed run: {found}")

    def _mismatch(self, name: str, what: str) -> None:
        self.counts[name]["mismatches"] += 1
        self.mismatches.append(f"{name}: {what}")


class Command:
    """`wandapp ARGUMENTS` in a fork of this process, which has imported it already: kills fall into work, not into imports.

    code   exit code, minus the signal's number where one killed it, None while it runs;  said: its stderr
    """

    def __init__(self, arguments: list[str], file_bytes: int | None):
        self.arguments = arguments
        self._stderr, writing = os.pipe()  # no file: RLIMIT_FSIZE would cut it
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)  # so that it never fills
        fork = multiprocessing.get_context("fork").Process(target=_child, args=(arguments, writing, file_bytes))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child is in the command line
        fork.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.close(writing)
        self._process, self.pid = fork, fork.pid

    def wait(self, seconds: float | None) -> None:
        self._process.join(seconds)

    @property
    def code(self) -> int | None:
        return self._process.exitcode

    @functools.cached_property
    def said(self) -> str:
        with os.fdopen(self._stderr, "r", errors="replace") as stderr:
            return stderr.read()


def _child(arguments: list[str], stderr: int, file_bytes: int | None) -> None:
    """The command line, with its output out of the way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["wandapp", *arguments]
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        cli.main()
    except KeyboardInterrupt:  # before its first line
        sys.exit(3)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is left is this benchmark's


def make_model(folder: Path) -> None:
    """A random Llama of BLOCKS blocks, and its calibration tokens beside it."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)  # a process that has threads of its own cannot be forked
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    save_pruned(AutoModelForCausalLM.from_config(config), None, folder, files={})
    save_file({"tokens": torch.randint(512, TOKENS)}, folder.parent / "ids.safetensors")


def digest(folder: Path) -> str:
    """Hash of every tensor of a checkpoint by name, however it is cut into files; the reason where it cannot be read."""
    from wandapp.weight_files import checkpoint_tensors

    try:
        files, sha = checkpoint_tensors(folder), hashlib.sha256()
    except WandappError as error:
        return str(error)
    for name in sorted(files.infos):
        tensor = files.read(name)
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for everything; a temporary one when left out")
    options = parser.parse_args()
    output = Output()
    machine = describe_machine(examine())
    output.rows(machine)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wandapp-soak-", dir=options.work) as work:
        soak = Soak(Path(work), options.minutes, options.seed)
        try:
            soak.run()
        finally:
            soak.close()
    columns = ["jobs", "kill", "stop", "fsize", "full", "vanish", "resumed", "mismatches"]
    total = sum(soak.counts.values(), Counter())
    rows = [[name, *(str(count[column]) for column in columns)] for name, count in soak.counts.items()]
    output.table(["recipe", *columns], [*rows, ["all", *(str(total[column]) for column in columns)]])
    for line in soak.mismatches:
        output.result(line)
    result = {"minutes": (time.monotonic() - start) / 60, "seed": options.seed, "machine": machine}
    result |= {"all": total, "recipes": soak.counts, "what": soak.mismatches, "small disk": soak.disk is not None}
    print(json.dumps(result))
    return 1 if soak.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
