"""The command `wandapp push`, and what --push-to-hub does after the other commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from wandapp.cli_options import Json, Private
from wandapp.console import Output
from wandapp.errors import WandappError

commands = typer.Typer()


@commands.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="folder of a checkpoint that wandapp wrote, dense or packed")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where it is not")],
    private: Private = False,
    json_only: Json = False,
) -> None:
    """Upload a checkpoint with its model card to the Hugging Face hub."""
    output = Output(json_only)
    output.finish({"folder": str(folder), **push_and_show(folder, repo, private, output)})


def check_push(repo: str | None, private: bool) -> None:
    """Raises early, before the work, where --push-to-hub could not be done after it."""
    if repo is None and private:
        raise WandappError("--private is of the repository of --push-to-hub OWNER/NAME, which was not given")
    if repo is not None:
        from wandapp.hub import check_push

        check_push(repo)


def push_and_show(folder: str | Path, repo: str | None, private: bool, output: Output) -> dict[str, Any]:
    """Upload and say where to; nothing without a `repo`."""
    if repo is None:
        return {}
    from wandapp.hub import push
    from wandapp.weight_files import checkpoint_files, is_packed

    folder = Path(folder)
    if not is_packed(folder):
        checkpoint_files(folder)
    output.note(f"uploading {folder} to {repo}")
    url = push(folder, repo, private=private)
    output.rows({"uploaded": url})
    return {"hub": url}
