"""What the commands' options share: common flags, and one flag per field of a set of options."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from wandapp.errors import WandappError, compiled
from wandapp.options import Options

PICTURES = (".png", ".svg", ".pdf")

Json = Annotated[bool, typer.Option("--json", help="last line of stdout is one JSON object; all else goes to stderr")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a folder that wandapp wrote")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
PushToHub = Annotated[str | None, typer.Option(help="upload the result to this hub repository, OWNER/NAME")]
Private = Annotated[bool, typer.Option("--private", help="make that repository private")]
Track = Annotated[
    list[str] | None, typer.Option(help="tensorboard, wandb or none; figures go to OUT.track; may be repeated")
]
RequireSparse = Annotated[
    bool, typer.Option("--require-sparse", help="refuse a model of which some packed linear map would run dense")
]
ModelArgument = Annotated[str, typer.Argument(help="hub id, local folder, .gguf file, or smollm2")]
PrunedFolder = Annotated[Path, typer.Argument(help="folder of a pruned checkpoint")]
Sparsity = Annotated[str | None, typer.Option(help="pattern it holds; left out: the folder's own recipe")]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        help="regular expression of linear maps that stay dense; may be repeated",
        callback=lambda given: given and [compiled(expression).pattern for expression in given],
    ),
]


def writable(path: Path | None) -> Path | None:
    """A file to be written after the work: refused before it where it could not be. A typer callback."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        reason = "it is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise WandappError(f"{path}: cannot be written, {reason}; choose another place")
    return path


def picture(path: Path | None) -> Path | None:
    """`writable` for a plot."""
    if path is not None and path.suffix not in PICTURES:
        raise WandappError(f"{path}: a plot is written as {' or '.join(PICTURES)}; choose such a name")
    return writable(path)


def with_flags_of(kind: type[Options], leave_out: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorator: the command with one flag per field of `kind`; those that were given arrive in `options`.

    Values stay text: `kind` alone decides what is valid and says what is not.
    """

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "options"]
        flags = [_flag(name, field) for name, field in kind.model_fields.items() if name not in leave_out]

        def run(**given: Any) -> None:
            arguments = {p.name: given.pop(p.name) for p in own}
            command(**arguments, options={name: value for name, value in given.items() if value not in (None, [])})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *flags)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = command.__doc__
        return run

    return decorate


def _flag(name: str, field: Any) -> inspect.Parameter:
    default = "" if field.default in (None, False, ()) else f" [{field.default}]"
    kind = {bool: bool, tuple: list[str]}.get(get_origin(field.annotation) or field.annotation, str)
    if field.annotation == bool | None:  # three states: yes, no, as wandapp likes
        kind, name_of_no = bool, f"/--no-{name.replace('_', '-')}"
    else:
        name_of_no = ""
    metavar = None if kind is bool else _metavar(field.annotation)
    option = typer.Option(
        f"--{name.replace('_', '-')}{name_of_no}", help=f"{field.description}{default}", metavar=metavar
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _metavar(annotation: Any) -> str:
    """What a flag's value looks like: "row|matrix", "float|auto", "int", "text"."""
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_metavar(member) for member in get_args(annotation) if member is not NoneType)
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return annotation.__name__ if annotation in (int, float) else "text"
