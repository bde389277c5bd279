"""The command `wandapp`. Each subcommand reads its options, calls the library and prints; nothing is computed here.

Exit codes: 0 done, 1 verification failed, 2 bad input (one sentence on stderr), 3 interrupted; see cli_habits.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from wandapp import (
    __version__,
    cli_bench,
    cli_eval,
    cli_habits,
    cli_hub,
    cli_inspect,
    cli_packed,
    cli_recover,
    cli_report,
    cli_sweep,
)
from wandapp.cli_options import Device, Dtype, Json, ModelArgument, Private, PushToHub, Track, with_flags_of
from wandapp.config import PruneConfig
from wandapp.console import Output, speaks_for_all
from wandapp.errors import WandappError

app = typer.Typer(
    help="Prune large language models in one shot, and prove the pattern.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for topic in (cli_packed, cli_eval, cli_recover, cli_inspect, cli_report, cli_hub, cli_sweep):
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
    json_only: Json = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Prune MODEL and write a checkpoint that transformers loads."""
    output = Output(json_only)
    if model is not None:
        options["model"] = model
    recipe = PruneConfig.from_yaml(config, **options) if config else PruneConfig(**options)
    packed = cli_packed.check_packed_output(recipe) if pack else None
    cli_hub.check_push(push_to_hub)
    report = run_recipe(recipe, output, track or ())
    if not speaks_for_all():
        return
    sizes = {"packed": cli_packed.pack_and_show(recipe.out, packed, output, overwrite=recipe.overwrite)} if pack else {}
    pushed = cli_hub.push_and_show(recipe.out, push_to_hub, private, output)
    output.finish({"model": recipe.model, "out": recipe.out, **report.to_dict(), **sizes, **pushed})


def run_recipe(recipe: PruneConfig, output: Output, trackers: Sequence[str] = ()) -> Any:
    """Load, prune, save; the report. Whatever can be refused is refused before the model is loaded."""
    from wandapp import methods

    for name, example in (("model", "wandapp prune smollm2 ..."), ("out", "--out pruned-model")):
        if getattr(recipe, name) is None:
            raise WandappError(f"prune needs {name}; give it, e.g. {example}")
    methods.resolve(recipe.method)
    from wandapp.distributed import join
    from wandapp.models import check_output, load_model, resolve_device, save_pruned
    from wandapp.track import check_trackers, tracking

    check_trackers(trackers)

    with join(resolve_device(recipe.device)) as ranks:
        ranks.first(lambda: check_output(recipe.out, recipe.overwrite))
        output.note(f"loading {recipe.model}")
        model, tokenizer = load_model(recipe.model, dtype=recipe.dtype)
        run = {"model": recipe.model, "method": recipe.method, "sparsity": recipe.sparsity, "seed": recipe.seed}
        with tracking(trackers if ranks.is_first else (), recipe.out, run) as log:
            report = prune_with_progress(model, tokenizer, recipe, output, ranks, log)
        if ranks.is_first:
            save_pruned(model, tokenizer, recipe.out, files=companion_files(recipe, report), overwrite=recipe.overwrite)
    output.rows(summary(recipe, report))
    return report


def prune_with_progress(
    model: Any, tokenizer: Any, recipe: PruneConfig, output: Output, ranks: Any = None, log: Any = None
) -> Any:
    """Prune in place, showing the block in work and the time left; warnings are printed at the end.

    log  told (block, its figures), see wandapp.track
    """
    from wandapp.pipeline import prune

    with output.progress(f"{recipe.method} {recipe.sparsity}: block") as update:

        def show(p: Any) -> None:
            update(p.block, p.blocks, f"{p.peak_gib:.1f} GiB  {p.message}", p.eta_seconds)
            if log:
                log(p.block, p.figures)

        report = prune(model, tokenizer, config=recipe, on_progress=show, ranks=ranks)
    for warning in report.warnings:
        output.warn(warning)
    return report


def summary(recipe: PruneConfig, report: Any) -> dict[str, str]:
    """What a person wants to know after a run."""
    return {
        "pruned": f"{recipe.model} with {recipe.method} to {recipe.sparsity}, {report.linears} linear maps",
        "sparsity": f"{report.sparsity:.4f}",
        "time": f"{report.seconds:.1f} s at {report.achieved_gflops:.0f} GFLOP/s; a plain matmul here runs at "
        f"{report.matmul_gflops:.0f} GFLOP/s",
        "peak memory": f"{report.peak_gib:.2f} GiB",
        "calibration": report.calibration,
        "saved": str(recipe.out),
    }


def companion_files(recipe: PruneConfig, report: Any) -> dict[str, str]:
    """Recipe, report and model card that lie beside the weights."""
    from wandapp.card import model_card
    from wandapp.report import block_figures, json_ready

    blocks = [{"step": step, **block_figures(record)} for step, record in enumerate(report.blocks, start=1)]
    return {
        "wandapp/recipe.yaml": recipe.resolved().dump_yaml(),
        "wandapp/blocks.jsonl": "".join(json.dumps(json_ready(block)) + "\n" for block in blocks),
        "wandapp/report.json": json.dumps(report.to_dict(), indent=1) + "\n",
        "README.md": model_card(recipe, report.to_dict()),
    }


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="folder of a pruned checkpoint")],
    sparsity: Annotated[str | None, typer.Option(help="pattern to check; left out: the folder's own recipe")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="regular expression of linear maps left out")] = None,
    json_only: Json = False,
) -> None:
    """Check that every linear map holds the pattern; exit 1 and name the first place where one does not."""
    from wandapp.models import load_model
    from wandapp.verify import verify_model, verify_packed
    from wandapp.weight_files import is_packed

    output = Output(json_only)
    if sparsity is None:
        recipe = PruneConfig.from_yaml(folder / "wandapp" / "recipe.yaml")
        sparsity, skip = recipe.sparsity, skip or recipe.skip
    skip = tuple(skip or ())
    if is_packed(folder):
        report = verify_packed(folder, sparsity, skip=skip)
    else:
        report = verify_model(load_model(str(folder)).model, sparsity, skip=skip)
    verdict = f"ok: {report.linears} linear maps hold {sparsity}" if report.ok else f"failed: {report.first_offence}"
    output.result(f"{verdict} (sparsity {report.sparsity:.4f})")
    output.finish(
        {"ok": report.ok, "linears": report.linears, "sparsity": report.sparsity, "first_offence": report.first_offence}
    )
    raise typer.Exit(0 if report.ok else 1)


@app.command("generate")
def generate_command(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to add at most")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_only: Json = False,
) -> None:
    """Continue PROMPT, always with the most likely token."""
    from wandapp.inference import load_either
    from wandapp.models import generate

    output = Output(json_only)
    loaded = load_either(model, dtype=dtype, device=device)
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
