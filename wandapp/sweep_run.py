"""Does the jobs of a sweep: one in this process, or all of them in processes of their own.

`run_all` starts `wandapp sweep FILE --job INDEX` for each, as a Slurm array or Ray would; `run_job` is what that does.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from wandapp.config import PruneConfig
from wandapp.console import Output
from wandapp.errors import WandappError, shorten
from wandapp.sweep import Job, Sweep, calibration_key, locked, shared_keys, state

POLL_SECONDS, STOP_SECONDS = 0.1, 120.0  # a block in work may have to end first


def run_job(sweep: Sweep, job: Job, output: Output) -> dict[str, Any]:
    """Does one job in this process and appends its line to the results; returns the row. A finished job is left alone.

    raises  WandappError, after a line that says so, where the job cannot be done
    """
    rows, _ = sweep.results.read()
    if state(job, rows) == "done":
        return rows[job.key]
    started = time.monotonic()
    row: dict[str, Any] = {"key": job.key, "name": job.name, "kind": job.kind, "recipe": job.options}
    try:
        result = {} if job.is_dense else {"report": _prune(sweep, job, output)}
        if job.evaluate:
            result["evaluation"] = _evaluate(job, job.recipe.source if job.is_dense else sweep.folder(job), output)
    except WandappError as error:
        sweep.results.append(row | {"status": "failed", "error": str(error)})
        raise
    row |= {"status": "done", "seconds": time.monotonic() - started, **result}
    sweep.results.append(row)
    return row


def _prune(sweep: Sweep, job: Job, output: Output) -> dict[str, Any]:
    """The report of pruning, without what it says of each block; that lies beside the checkpoint."""
    from wandapp.cli import run_recipe

    shares_gradients = any(sweep.sharers[key] > 1 for key in shared_keys(job.recipe)[1:])
    places = {"out": str(sweep.folder(job)), "gblm_cache": str(sweep.out / "shared") if shares_gradients else None}
    recipe = PruneConfig(**_with_shared_tokens(sweep, job.recipe, output).model_dump() | places)
    report = run_recipe(recipe, output, resume=True).to_dict()
    return {name: value for name, value in report.items() if name != "blocks"}


def _evaluate(job: Job, model: str | Path, output: Output) -> dict[str, Any]:
    from wandapp.evaluate import perplexity
    from wandapp.models import load_model

    loaded = load_model(model, dtype=job.recipe.dtype, device=job.recipe.device)
    with output.progress("evaluation: window") as update:
        return perplexity(*loaded, **job.evaluate.model_dump(), on_progress=update).to_dict()


def _with_shared_tokens(sweep: Sweep, recipe: PruneConfig, output: Output) -> PruneConfig:
    """The recipe with a file of calibration tokens, where several jobs need the same; the first one writes it."""
    from wandapp.calibration import is_token_file, load_calibration, save_tokens
    from wandapp.models import load_model
    from wandapp.tokenizer import tokenizer_of

    key = calibration_key(recipe)
    if is_token_file(recipe.calibration) or sweep.sharers[key] < 2:
        return recipe
    path = sweep.out / "shared" / f"tokens-{key[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock, locked(lock):
        if not path.exists():
            output.note(f"drawing the calibration tokens that {sweep.sharers[key]} jobs share")
            writes = recipe.calibration == "self"  # only then the weights are needed
            model, tokenizer = (
                load_model(recipe.source, dtype=recipe.dtype) if writes else (None, tokenizer_of(recipe.source))
            )
            options = {name: getattr(recipe, name) for name in ("samples", "seq_len", "seed", "text_field")}
            options["temperature"] = recipe.resolved().self_temperature
            drawn = load_calibration(recipe.calibration, tokenizer, model=model, **options)
            save_tokens(drawn.tokens, path, origin=drawn.description)
    return PruneConfig(**recipe.model_dump() | {"calibration": str(path)})


class Outcome(NamedTuple):
    """What `run_all` did: jobs done before, done now, and failed (job, reason); the rest was not reached."""

    before: list[Job]
    done: list[Job]
    failed: list[tuple[Job, str]]


def run_all(sweep: Sweep, workers: int, on_change: Callable[[Outcome, int], None]) -> Outcome:
    """Runs every unfinished job, `workers` processes at a time; a job that fails does not disturb the others.

    on_change  called with the outcome so far and the number of running jobs whenever a job ends
    raises     KeyboardInterrupt on SIGINT or SIGTERM, after every process was asked to stop and did
    """
    rows, _ = sweep.results.read()
    waiting = deque(job for job in sweep.jobs if state(job, rows) != "done")
    outcome = Outcome([job for job in sweep.jobs if state(job, rows) == "done"], [], [])
    running: dict[subprocess.Popen, Job] = {}
    try:
        with _sigterm_interrupts():
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.popleft()
                    running[_start(sweep, job, workers)] = job
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    if process.returncode:
                        outcome.failed.append((job, _reason(process.returncode, sweep.log(job))))
                    else:
                        outcome.done.append(job)
                    on_change(outcome, len(running))
    except KeyboardInterrupt:
        _stop(list(running))
        raise
    return outcome


def _start(sweep: Sweep, job: Job, workers: int) -> subprocess.Popen:
    """The job's process, in a session of its own: the terminal's Ctrl-C reaches it through us."""
    sweep.log(job).parent.mkdir(parents=True, exist_ok=True)
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    with open(sweep.log(job), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "wandapp", "sweep", str(sweep.path), "--job", str(sweep.jobs.index(job))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads // workers))},
            start_new_session=True,
        )


def _stop(processes: list[subprocess.Popen]) -> None:
    """Asks processes to stop as Ctrl-C does; kills those that take longer than STOP_SECONDS, or at a second Ctrl-C."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_SECONDS
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()
            process.wait()


def _reason(code: int, log: Path) -> str:
    """Why a job's process ended with that code: its own sentence, or the last line it wrote."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 10_000))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("wandapp: ") for line in lines if line.startswith("wandapp: ")]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + ("; memory may have run out" if name == "SIGKILL" else "")
    return said[-1] if said and code in (2, 3) else f"exit code {code}: {shorten(lines[-1] if lines else 'no output')}"


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
