"""The command `wandapp`. Each subcommand reads its options, calls the library and prints; nothing is computed here.

Exit codes: 0 done, 1 verification failed, 2 bad input (one sentence on stderr), 3 interrupted; see cli_habits.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from wandapp import (
    __version__,
    cli_bench,
    cli_eval,
    cli_export,
    cli_habits,
    cli_hub,
    cli_inspect,
    cli_packed,
    cli_recover,
    cli_report,
    cli_sweep,
)
from wandapp.cli_options import (
    Device,
    Dtype,
    Json,
    ModelArgument,
    Private,
    PrunedFolder,
    PushToHub,
    RequireSparse,
    Skip,
    Sparsity,
    Track,
    with_flags_of,
)
from wandapp.config import RECIPE_FILE, PruneConfig
from wandapp.console import Output, duration, speaks_for_all

app = typer.Typer(
    help="Prune large language models in one shot, and prove the pattern.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for topic in (cli_packed, cli_export, cli_eval, cli_recover, cli_inspect, cli_report, cli_hub, cli_sweep):
    app.add_typer(topic.commands)
app.add_typer(cli_bench.bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    cli_habits.run(app)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command("prune")
@with_flags_of(PruneConfig, leave_out=("model",))
def prune_command(
    model: Annotated[str | None, typer.Argument(help="hub id, local folder, .gguf file, or smollm2")] = None,
    config: Annotated[Path | None, typer.Option(help="recipe.yaml with any of these options; flags win")] = None,
    pack: Annotated[bool, typer.Option("--pack", help="also write the packed form, to OUT-packed")] = False,
    track: Track = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with an interrupted run; begin where there is none")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say what memory, disk and time it will take, and stop")] = False,
    json_only: Json = False,
    *,
    options: dict[str, Any],
) -> None:
    """Prune MODEL and write a checkpoint that transformers loads."""
    output = Output(json_only)
    if model is not None:
        options["model"] = model
    recipe = (PruneConfig.from_yaml(config, **options) if config else PruneConfig(**options)).resolved()
    if plan:
        return show_plan(recipe, output)
    packed, replaces = cli_packed.check_packed_output(recipe, resume) if pack else (None, False)
    cli_hub.check_push(push_to_hub, private)
    _warn_of_unread(recipe, options, output)
    report = run_recipe(recipe, output, track or (), resume=resume)
    if not speaks_for_all():
        return
    sizes = (
        {"packed": cli_packed.pack_and_show(Path(recipe.target), packed, output, overwrite=replaces)} if packed else {}
    )
    pushed = cli_hub.push_and_show(recipe.target, push_to_hub, private, output)
    output.finish({"model": recipe.model, "out": recipe.out, **report.to_dict(), **sizes, **pushed})


def _warn_of_unread(recipe: PruneConfig, options: dict[str, Any], output: Output) -> None:
    from wandapp.methods import unread

    for option, readers in unread(recipe, options).items():
        output.warn(f"--{option.replace('_', '-')} is an option of {' and '.join(readers)}, which this run is without")


def run_recipe(recipe: PruneConfig, output: Output, trackers: Sequence[str] = (), *, resume: bool = False) -> Any:
    """Load, prune, save; the report. Whatever can be refused is refused before the model is loaded."""
    from wandapp.job import prune_checkpoint
    from wandapp.track import check_trackers, tracking

    check_trackers(trackers)
    run = {"model": recipe.model, "method": recipe.method, "sparsity": recipe.sparsity, "seed": recipe.seed}
    log_in = tracking(trackers if speaks_for_all() and recipe.out else (), recipe.out or "", run)
    with log_in as log, _progress(recipe, output, log) as on_progress:
        report = prune_checkpoint(recipe, resume=resume, on_progress=on_progress, say=output.note)
    for warning in report.warnings:
        output.warn(warning)
    output.rows(summary(recipe, report))
    return report


def show_plan(recipe: PruneConfig, output: Output) -> None:
    """What the run will need, beside what is there."""
    from wandapp.plan import plan_run

    plan, gib = plan_run(recipe), 2**30
    parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in plan.parts.items())
    output.rows(
        {
            "blocks": f"{plan.blocks}, {'read from the disk one by one' if plan.streams else 'all in memory'}",
            "calibration": f"{plan.samples} samples of {plan.seq_len} tokens",
            "peak memory": f"{plan.peak_bytes / gib:.2f} GiB ({parts}); free: {plan.free_bytes / gib:.2f}",
            "disk": f"{plan.disk_bytes / gib:.2f} GiB; free: {plan.free_disk_bytes / gib:.2f}",
            "time": f"about {duration(plan.seconds)} of work, at the {plan.matmul_gflops:.0f} GFLOP/s measured here",
        }
    )
    output.finish(plan.to_dict())


@contextmanager
def _progress(recipe: PruneConfig, output: Output, log: Callable | None = None) -> Iterator[Callable]:
    """What to call after every block, to show the block in work and the time left.

    log  told (block, its figures), see wandapp.track
    """
    with output.progress(f"{recipe.method} {recipe.sparsity}: block") as update:

        def show(p: Any) -> None:
            update(p.block, p.blocks, f"{p.peak_gib:.1f} GiB  {p.message}", p.eta_seconds)
            if log:
                log(p.block, p.figures)

        yield show


def prune_with_progress(model: Any, tokenizer: Any, recipe: PruneConfig, output: Output) -> Any:
    """Prune in place, showing the block in work and the time left; warnings are printed at the end."""
    from wandapp.pipeline import prune

    with _progress(recipe, output) as on_progress:
        report = prune(model, tokenizer, config=recipe, on_progress=on_progress)
    for warning in report.warnings:
        output.warn(warning)
    return report


def summary(recipe: PruneConfig, report: Any) -> dict[str, str]:
    """What a person wants to know after a run."""
    waited = report.seconds_by_phase.get("disk", 0.0)
    by_block = report.allocation.values()
    spread = {"by block": f"{min(by_block):.4f} to {max(by_block):.4f} ({recipe.allocate})"} if by_block else {}
    tuning = report.tuning.values()
    tuned = {"tuned": "{:.4f} -> {:.4f} nats per token from the dense model".format(*tuning)} if tuning else {}
    whole = report.weights + report.dense_weights
    kept = f"{len(report.kept_dense)} linear maps, {report.dense_weights / max(whole, 1):.1%} of the blocks' weights"
    return {
        "pruned": f"{recipe.model} with {recipe.method} to {recipe.sparsity}, {report.linears} linear maps",
        "sparsity": f"{report.sparsity:.4f}",
        **(
            {"kept dense": f"{kept}, of which {report.zeros / max(whole, 1):.1%} are zero"} if report.kept_dense else {}
        ),
        **spread,
        **tuned,
        "time": f"{report.seconds:.1f} s at {report.achieved_gflops:.0f} GFLOP/s; a plain matmul here runs at "
        f"{report.matmul_gflops:.0f} GFLOP/s",
        "waited for disk": f"{waited:.1f} s, {waited / max(report.seconds, 1e-9):.1%} of the time",
        "peak memory": f"{report.peak_gib:.2f} GiB",
        "calibration": report.calibration,
        "saved": str(recipe.out),
    }


@app.command("verify")
def verify_command(
    folder: PrunedFolder,
    sparsity: Sparsity = None,
    skip: Skip = None,
    json_only: Json = False,
) -> None:
    """Check that every linear map holds the pattern; exit 1 and name the first place where one does not."""
    from wandapp.models import load_model
    from wandapp.verify import verify_model, verify_packed
    from wandapp.weight_files import is_packed, refuse_special_files

    refuse_special_files(folder)
    output, is_allocated = Output(json_only), False
    if sparsity is None or (folder / RECIPE_FILE).is_file():
        recipe = PruneConfig.of_checkpoint(folder)
        is_allocated = recipe.is_allocated
        sparsity, skip = sparsity or recipe.sparsity, skip or list(recipe.skip)
    options: dict[str, Any] = {"skip": tuple(skip or ()), "together": is_allocated}
    if is_packed(folder):
        report = verify_packed(folder, sparsity, **options)
    else:
        report = verify_model(load_model(str(folder)).model, sparsity, **options)
    together = " together" if is_allocated else ""
    dense = f", apart from what --skip {' '.join(skip)} leaves dense" if skip else ""
    verdict = (
        f"ok: {report.linears} linear maps{together} hold {sparsity}{dense}"
        if report.ok
        else f"failed: {report.first_offence}"
    )
    output.result(f"{verdict} (sparsity {report.sparsity:.4f})")
    output.finish(
        {
            "ok": report.ok,
            "linears": report.linears,
            "skip": list(skip or ()),
            "sparsity": report.sparsity,
            "first_offence": report.first_offence,
        }
    )
    raise typer.Exit(0 if report.ok else 1)


@app.command("generate")
def generate_command(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to add at most")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    require_sparse: RequireSparse = False,
    json_only: Json = False,
) -> None:
    """Continue PROMPT, always with the most likely token."""
    from wandapp.inference import fallback_notes, load_either
    from wandapp.tokenizer import generate

    output = Output(json_only)
    loaded = load_either(model, dtype=dtype, device=device, require_sparse=require_sparse)
    for note in fallback_notes(loaded.model):
        output.note(note)
    text = generate(loaded.model, loaded.tokenizer, prompt, max_new_tokens)
    output.result(prompt + text)
    output.finish({"model": model, "prompt": prompt, "text": text})


@app.command("doctor")
def doctor_command(json_only: Json = False) -> None:
    """Show versions, processor, GPU, compilers, and the backend each kernel would run, with the reason."""
    from wandapp.doctor import describe_machine, examine

    output = Output(json_only)
    found = examine()
    output.rows(found["versions"] | describe_machine(found))
    output.result("")
    output.table(
        ["kernel", "tensors", "backend", "why, and why not another"], [_backend_row(c) for c in found["backends"]]
    )
    output.finish(found)


def _backend_row(choice: dict[str, Any]) -> list[str]:
    obstacles: dict[str, list[str]] = {}
    for name, why in choice["availability"].items():
        if why:
            obstacles.setdefault(why, []).append(name)
    excluded = [f"{', '.join(names)}: {why}" for why, names in obstacles.items()]
    reasons = [choice["reason"], *excluded] if choice["backend"] else excluded
    return [choice["function"], choice["device"], choice["backend"] or "none", "; ".join(reasons)]


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="folder for the pruned checkpoint; replaced")] = Path("out/smollm2-2of4"),
    json_only: Json = False,
) -> None:
    """Prune SmolLM2-135M to 2:4 on built-in text, and compare it with the dense model and with magnitude pruning."""
    from wandapp.demo import run_demo

    output = Output(json_only)
    output.finish(run_demo(out, output))
