"""The command `wandapp report`."""

from pathlib import Path
from typing import Annotated

import typer

from wandapp.cli_options import Json
from wandapp.console import Output
from wandapp.errors import WandappError

commands = typer.Typer()


@commands.command("report")
def report_command(
    run: Annotated[
        list[str],
        typer.Argument(help="folders that prune, pack or recover wrote, a sweep's results, saved --json output"),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(help="folder for every plot as .png and .svg")] = None,
    json_only: Json = False,
) -> None:
    """Show runs side by side in one HTML file that needs no network."""
    try:
        from wandapp.html_report import write_report
        from wandapp.plots import draw  # noqa: F401  matplotlib, asked for before anything is read
    except ImportError as error:
        raise WandappError(f"report needs {error.name}; install it with: pip install 'wandapp[plot]'") from None
    from wandapp.runs import read_runs

    output = Output(json_only)
    written = write_report(read_runs(run), out, plots)
    output.rows(
        {
            "report": f"{written['out']} ({written['bytes'] / 2**10:.0f} KiB)",
            "runs": ", ".join(written["runs"]),
            "sections": ", ".join(written["sections"]) or "none",
            "warnings": str(written["warnings"]),
        }
    )
    output.finish(written)
