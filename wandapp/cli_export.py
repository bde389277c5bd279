"""The command `wandapp export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wandapp.cli_options import Json, Overwrite
from wandapp.console import Output

commands = typer.Typer()


class Target(StrEnum):
    """Who reads it."""

    torch_24 = "torch-2:4"


@commands.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(help="folder of a 2:4 checkpoint, packed or dense with zeros")],
    out: Annotated[Path, typer.Argument(help="folder for the export")],
    to: Annotated[Target, typer.Option(help="torch-2:4: the state of torch's SparseSemiStructuredTensor")],
    dtype: Annotated[str | None, typer.Option(help="float16 or bfloat16, where the checkpoint has float32")] = None,
    overwrite: Overwrite = False,
    json_only: Json = False,
) -> None:
    """Write a 2:4 checkpoint for another runtime.

    wandapp export pruned for-torch --to torch-2:4 --dtype bfloat16
    """
    from wandapp.export import export_torch_24

    output = Output(json_only)
    with output.progress("exporting: file") as update:
        summary = export_torch_24(folder, out, dtype=dtype, overwrite=overwrite, on_progress=update)
    for reason, names in summary.left_dense.items():
        output.warn(f"{len(names)} linear maps {reason}; they stay dense, the first is {names[0]}")
    dense, exported = summary.dense_bytes / 2**20, summary.exported_bytes / 2**20
    sizes = f"{dense:.1f} MiB dense, {exported:.1f} MiB exported ({exported / dense:.2%})"
    output.rows({"compressed": f"{summary.compressed} linear maps", "all tensors": sizes, "saved": str(out)})
    output.finish({"out": str(out), "to": to.value, **vars(summary)})
