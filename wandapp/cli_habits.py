"""What all commands share: --quiet and --verbose, examples in --help, completion, exit codes, one sentence per error."""

import difflib
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.main import get_command

from wandapp.console import Verbosity, fail, set_verbosity, speaks_for_all, verbosity
from wandapp.errors import Interrupted, WandappError
from wandapp.stop import Stoppable

EXIT_CODES = """\b
Exit codes:
  0  done
  1  a verification failed
  2  bad input; one sentence on stderr says what and how to mend it
  3  interrupted; what can be resumed says so
"""

# By command, as they stand in --help. A command may as well carry its own in its docstring.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "prune": (
        "wandapp prune smollm2 --calibration pydoc --samples 64 --seq-len 512 --out pruned",
        "wandapp prune smollm2 --method wanda++ --sparsity 4:8 --calibration c4.jsonl --out pruned --pack",
        "wandapp prune --config pruned/wandapp/recipe.yaml --out again",
    ),
    "eval": (
        "wandapp eval pruned --text wikitext2",
        "wandapp eval pruned --text pydoc --seq-len 512 --windows 20 --dense --json",
        "wandapp eval pruned --tasks wanda7 --dense --batch-size 8",
    ),
    "recover": (
        "wandapp recover pruned --out recovered --text pydoc --samples 64 --seq-len 256 --preset strong",
        "wandapp recover pruned --out recovered --text c4 --full --track tensorboard --resume",
    ),
    "inspect": ("wandapp inspect pruned", "wandapp inspect packed --layers --json"),
    "push": ("wandapp push pruned OWNER/NAME --private",),
    "verify": ("wandapp verify pruned", "wandapp verify pruned --sparsity 2:4 --skip down_proj"),
    "generate": ("wandapp generate pruned 'The sea is'", "wandapp generate packed 'The sea is' --max-new-tokens 16"),
    "doctor": ("wandapp doctor", "wandapp doctor --json"),
    "demo": ("wandapp demo", "wandapp demo --out out/demo"),
    "pack": ("wandapp pack pruned packed", "wandapp pack pruned packed --sparsity 2:4 --overwrite"),
    "unpack": ("wandapp unpack packed dense-again",),
    "bench inference": ("wandapp bench inference packed", "wandapp bench inference packed --batch 1 --plot speed.svg"),
    "report": (
        "wandapp report pruned --out report.html",
        "wandapp report wanda wanda++ packed eval.json bench.json --out report.html --plots plots",
    ),
    "sweep": ("wandapp sweep sweep.yaml --dry-run", "wandapp sweep sweep.yaml --workers 4"),
    "bench kernels": ("wandapp bench kernels llama-7b", "wandapp bench kernels --shape 4096x4096 --only selection"),
}


def run(app: typer.Typer) -> None:
    """Run the command line with the arguments of this process, and leave with its exit code."""
    set_verbosity(Verbosity.NORMAL)
    try:
        with Stoppable(lambda name: KeyboardInterrupt()):
            code = complete(app)(prog_name="wandapp", standalone_mode=False)
    except WandappError as error:
        _explain(error)
        sys.exit(2)
    except Interrupted as stop:
        if speaks_for_all():
            fail(stop)
        sys.exit(3)
    except typer.TyperException as error:
        _refuse(error)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    if code == 130:  # what a shell calls SIGINT
        fail("interrupted; no unfinished output is left")
        sys.exit(3)
    sys.exit(code or 0)


def complete(app: typer.Typer) -> Any:
    """The command tree of `app`, with what every command has beside its own options."""
    tree = get_command(app)
    tree.epilog, switches = EXIT_CODES, _switches()
    for path, command in commands(tree):
        if path in EXAMPLES:
            command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[path])
        command.params += switches
    return tree


def commands(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(words after `wandapp`, command) of every command below `tree`."""
    for name, command in tree.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name, command


def _switches() -> list[Any]:
    """The parameters --quiet and --verbose."""
    shared = typer.Typer(add_completion=False)

    def switch(verbosity: Verbosity) -> Any:
        return lambda given: set_verbosity(verbosity) if given else None

    quiet = typer.Option("-q", "--quiet", help="print the result, warnings and errors only", expose_value=False)
    verbose = typer.Option("-v", "--verbose", help="print every step, logs and errors in full", expose_value=False)
    quiet.callback, verbose.callback = switch(Verbosity.QUIET), switch(Verbosity.VERBOSE)

    @shared.command()
    def with_switches(quiet: Annotated[bool, quiet] = False, verbose: Annotated[bool, verbose] = False) -> None: ...

    return get_command(shared).params


def _refuse(error: typer.TyperException) -> None:
    """Say what is wrong with the arguments, and the nearest option there is."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    message = message.replace("Value error, ", "")  # how pydantic introduces a rule of typer's
    if message.startswith("Usage:"):  # a group without a command: the message is its help
        print(message, file=sys.stderr)
        return
    message = " ".join(message.split())
    wrong = getattr(error, "option_name", None)
    if wrong and context:
        known = [name for parameter in context.command.params for name in parameter.opts]
        close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
        message = f"No such option: {wrong}" + (f"; did you mean {close[0]}?" if close else "")
    fail(f"{message} (see {context.command_path if context else 'wandapp'} --help)")


def _explain(error: WandappError) -> None:
    if verbosity() is Verbosity.VERBOSE:
        traceback.print_exception(error)
    if speaks_for_all() or error.is_of_one_rank:
        fail(error)
