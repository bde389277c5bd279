"""The command `wandapp inspect`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from wandapp.cli_options import Json, Skip
from wandapp.console import Output

commands = typer.Typer()


@commands.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="folder of a checkpoint, dense or packed")],
    layers: Annotated[bool, typer.Option("--layers", help="one line per linear map, not per kind")] = False,
    skip: Skip = None,
    json_only: Json = False,
) -> None:
    """Show the zeros of a checkpoint, the n:m patterns that hold, and which products a GPU's 2:4 libraries would take."""
    from wandapp.inspection import GPU_MULTIPLES, inspect_checkpoint, not_implied

    output = Output(json_only)
    with output.progress("reading: tensor") as update:
        found = inspect_checkpoint(folder, skip=tuple(skip or ()), on_progress=update)
    totals = found.totals()
    output.rows(
        {
            "checkpoint": f"{found.form}, {found.model}, {found.file_bytes / 2**20:.1f} MiB of weight files",
            "linear maps": f"{totals['linears']} in decoder blocks, {totals['weights']:,} weights, "
            f"{totals['sparsity']:.2%} zeros",
            "in all of them": " ".join(not_implied(totals["patterns"])) or "no n:m pattern",
            "other tensors": str(found.other_tensors),
        }
    )
    columns = ["linear map", "number", "out x in", "zeros", "patterns along the inputs", "2:4 on GPU"]
    for title, linears in (("", found.linears), ("fused, as inference programs do:", found.fused)):
        if linears:
            output.result(f"\n{title}".rstrip(" "))
            output.table(columns, [_row(name, group) for name, group in _groups(linears, layers)])
    output.result("")
    output.rows(
        {
            f"{library} {rows} x {cols}": f"{totals['gpu'][library]} of {totals['linears']} linear maps, "
            f"{totals['gpu_after_fusion'][library]} of {totals['products_after_fusion']} after fusion"
            for library, (rows, cols) in GPU_MULTIPLES.items()
        }
    )
    output.finish(found.to_dict())


def _groups(linears: list[Any], each: bool) -> list[tuple[str, list[Any]]]:
    """Linear maps of one kind together: the same name but for its numbers, and the same shape and patterns."""
    groups: dict[tuple, list[Any]] = {}
    for linear in linears:
        name = linear.name if each else re.sub(r"\.\d+(?=\.|$)", ".*", linear.name)
        groups.setdefault((name, linear.shape, linear.patterns), []).append(linear)
    return [(key[0], group) for key, group in groups.items()]


def _row(name: str, group: list[Any]) -> list[str]:
    from wandapp.inspection import not_implied

    low, high = (f"{pick(linear.sparsity for linear in group):.2%}" for pick in (min, max))
    first = group[0]
    fits = "shape fits, 2:4 does not hold" if any(first.fits.values()) else "shape fits no library"
    return [
        name,
        str(len(group)),
        f"{first.shape[0]} x {first.shape[1]}",
        low if low == high else f"{low} - {high}",
        " ".join(not_implied(first.patterns)) or "-",
        ", ".join(first.runs_on()) or fits,
    ]
