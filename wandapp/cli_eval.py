"""The command `wandapp eval`."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from wandapp.cli_options import Device, Dtype, Json, ModelArgument, RequireSparse
from wandapp.console import Output

commands = typer.Typer()
COMPARED = ("acc", "acc_norm", "exact_match", "f1", "perplexity")  # of the many that lm-eval gives


@commands.command("eval")
def eval_command(
    model: ModelArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(help="wikitext2, c4, pydoc, a file or a hub dataset; may be repeated [wikitext2 without --tasks]"),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="tokens per window; 2048 when left out")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="windows to use; all when left out")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="windows, or tasks' requests, per forward")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="measure the model it was pruned from too")] = False,
    dense_model: Annotated[str | None, typer.Option(help="that model, where no recipe names it")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="wanda7, wandapp9, mmlu5, lm-eval's names, task .yaml files or folders; commas or repeated"),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in each task's prompt")] = None,
    limit: Annotated[float | None, typer.Option(min=0, help="documents per task, or their share below 1")] = None,
    save: Annotated[bool, typer.Option("--save", help="keep the figures in MODEL/wandapp and its model card")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    require_sparse: RequireSparse = False,
    json_only: Json = False,
) -> None:
    """Measure perplexity and task accuracy, and state everything the figures depend on."""
    from wandapp.evaluation import EvalOptions, base_of, check_keeping, evaluate_checkpoint, keep_figures

    output = Output(json_only)
    if save:
        check_keeping(model)
    names = tuple(name for given in tasks or () for name in given.split(",") if name)
    texts = tuple(text or (() if names else ("wikitext2",)))
    options = EvalOptions(texts, seq_len, windows, batch_size, names, num_fewshot, limit, dtype, device)
    base = dense_model or (base_of(model) if dense else None)
    measured = []
    for reference in filter(None, (model, base)):
        with output.progress("done") as update:
            its = replace(options, require_sparse=require_sparse and reference == model)
            measured.append(evaluate_checkpoint(reference, its, on_progress=update, on_note=output.note))
    figures, baseline = measured[0], measured[1] if base else None
    _show(figures, baseline, output)
    if save:
        keep_figures(model, figures | {"dense": baseline})
    first = figures["perplexities"][0] if figures["perplexities"] else {}
    output.finish({**first, **figures, "dense": baseline})


def _show(figures: dict[str, Any], baseline: dict[str, Any] | None, output: Output) -> None:
    for index, result in enumerate(figures["perplexities"]):
        rows = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in result.items()}
        if baseline:
            rows = {
                "perplexity": rows["perplexity"],
                "dense": f"{baseline['perplexities'][index]['perplexity']:.4f}",
            } | rows
        if index:
            output.result("")
        output.rows(rows)
    if figures["tasks"]:
        _show_tasks(figures["tasks"], baseline and baseline["tasks"], output)


def _show_tasks(found: dict[str, Any], dense: dict[str, Any] | None, output: Output) -> None:
    columns = list(dict.fromkeys(name for task in found["tasks"] for name in _compared(task["metrics"])))
    rows = []
    for index, task in enumerate(found["tasks"]):
        shown = _compared(task["metrics"])
        other = _compared(dense["tasks"][index]["metrics"]) if dense else {}
        cells = [shown.get(name, "-") for name in columns]
        beside = [other.get(name, "-") for name in columns] if dense else []
        rows.append([task["task"], *cells, *beside, str(task["num_fewshot"]), str(task["samples"] or "-")])
    heads = [*columns, *([f"dense {name}" for name in columns] if dense else [])]
    output.table(["task", *heads, "shots", "documents"], rows)
    if found["mean_accuracy"] is not None:
        also = f" (dense {dense['mean_accuracy']:.4f})" if dense else ""
        output.result(f"mean acc {found['mean_accuracy']:.4f}{also}")
    if found["limit"] is not None:
        output.warn(f"--limit {found['limit']:g}: not all documents, so compare with nothing else")


def _compared(metrics: dict[str, float]) -> dict[str, str]:
    """The metrics that people compare, with their standard errors, as text."""
    errors = {name: metrics.get(f"{name}_stderr") for name in COMPARED}
    return {
        name: f"{metrics[name]:.4f}" + (f" ± {errors[name]:.4f}" if errors[name] is not None else "")
        for name in COMPARED
        if name in metrics
    }
