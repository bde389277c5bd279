"""The command sweep: every job of a file, or one of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from wandapp.cli_options import Json
from wandapp.console import Output, fail
from wandapp.sweep import Sweep, state
from wandapp.sweep_run import Outcome, run_all, run_job

commands = typer.Typer()


@commands.command("sweep")
def sweep_command(
    file: Annotated[
        Path, typer.Argument(help="YAML file with out, models, methods, patterns, seeds and other options")
    ],
    workers: Annotated[int, typer.Option(min=1, help="jobs at a time; threads are split among them")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the jobs and what became of them")] = False,
    count: Annotated[bool, typer.Option("--count", help="print the number of jobs")] = False,
    job: Annotated[int | None, typer.Option(help="do only the job of this index, in this process")] = None,
    json_only: Json = False,
) -> None:
    """Prune models x methods x patterns x seeds, each job a process of its own; run again to go on."""
    output, sweep = Output(json_only), Sweep(file)
    if count:
        output.result(str(len(sweep.jobs)))
        output.finish({"jobs": len(sweep.jobs)})
    elif dry_run:
        _list(sweep, output)
    elif job is not None:
        output.finish(run_job(sweep, sweep.job(job), output))
    else:
        _run(sweep, workers, output)


def _list(sweep: Sweep, output: Output) -> None:
    rows = _rows(sweep, output)
    jobs: list[dict[str, Any]] = [
        {"index": index, "name": job.name, "state": state(job, rows)} for index, job in enumerate(sweep.jobs)
    ]
    output.table(["job", "name", "state"], [[str(job["index"]), job["name"], job["state"]] for job in jobs])
    output.finish({"jobs": jobs, "out": str(sweep.out)})


def _rows(sweep: Sweep, output: Output) -> dict[str, dict[str, Any]]:
    rows, unreadable = sweep.results.read()
    if unreadable:
        output.warn(
            f"{sweep.results.path}: {unreadable} lines are no results, of a process that died; they do not count"
        )
    return rows


def _run(sweep: Sweep, workers: int, output: Output) -> None:
    output.note(f"{len(sweep.jobs)} jobs, {workers} at a time; logs in {sweep.out / 'logs'}")
    try:
        with output.progress("sweep: job") as update:
            outcome = run_all(sweep, workers, lambda done, running: update(*_progress(sweep, done, running)))
    except KeyboardInterrupt:
        fail(_interrupted(sweep, workers))
        raise typer.Exit(3) from None
    rows = _rows(sweep, output)
    output.table(["name", "state", "sparsity", "perplexity", "seconds"], [_row(job, rows) for job in sweep.jobs])
    for job, reason in outcome.failed:
        output.result(f"failed: {job.name}: {reason}; log: {sweep.log(job)}")
    output.finish(
        {
            "out": str(sweep.out),
            "results": str(sweep.results.path),
            "jobs": len(sweep.jobs),
            "done_before": len(outcome.before),
            "done": len(outcome.done),
            "failed": [{"name": j.name, "error": reason, "log": str(sweep.log(j))} for j, reason in outcome.failed],
        }
    )
    raise typer.Exit(1 if outcome.failed else 0)


def _progress(sweep: Sweep, outcome: Outcome, running: int) -> tuple[int, int, str]:
    finished = len(outcome.before) + len(outcome.done)
    return finished, len(sweep.jobs), f"{running} running, {len(outcome.failed)} failed"


def _interrupted(sweep: Sweep, workers: int) -> InterruptedError:
    rows, _ = sweep.results.read()
    done = sum(state(job, rows) == "done" for job in sweep.jobs)
    again = f"wandapp sweep {sweep.path}" + (f" --workers {workers}" if workers > 1 else "")
    return InterruptedError(f"interrupted; {done} of {len(sweep.jobs)} jobs are done, go on with: {again}")


def _row(job: Any, rows: dict[str, dict[str, Any]]) -> list[str]:
    row = rows.get(job.key, {})
    sparsity, evaluation = row.get("report", {}).get("sparsity"), row.get("evaluation", {})
    figures = (sparsity, "{:.4f}"), (evaluation.get("perplexity"), "{:.3f}"), (row.get("seconds"), "{:.1f}")
    return [job.name, state(job, rows), *("-" if value is None else form.format(value) for value, form in figures)]
