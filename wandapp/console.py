"""What the commands print: results on stdout, everything else on stderr, progress fit for a terminal or a log file."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 30.0  # in a log file; a terminal gets a live bar


class Verbosity(Enum):
    """How much a command says beside its result, its warnings and its errors."""

    QUIET = 0  # nothing
    NORMAL = 1  # what it is doing, and progress
    VERBOSE = 2  # every step, the libraries' logs, and where an error arose


_verbosity = Verbosity.NORMAL


def verbosity() -> Verbosity:
    """How much this process says."""
    return _verbosity


def set_verbosity(value: Verbosity) -> None:
    """Set how much this process says from now on."""
    global _verbosity
    _verbosity = value
    if value is Verbosity.VERBOSE:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def speaks_for_all() -> bool:
    """Whether this process talks to the user: under torchrun only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


class Output:
    """Where a command's text goes. With --json, stdout gets one JSON object as its last line and nothing else.

    Colours, and none where NO_COLOR is set, are rich's business.
    """

    def __init__(self, json_only: bool = False):
        self.json_only, quiet = json_only, not speaks_for_all()
        self.stderr = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self.results = self.stderr if json_only else Console(highlight=False, soft_wrap=True, quiet=quiet)

    def note(self, text: str) -> None:
        """Say what is going on, unless asked to be quiet."""
        if _verbosity is Verbosity.QUIET:
            return
        self.stderr.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Say what the user should know before trusting the result."""
        self.stderr.print(f"warning: {text}", style="yellow", markup=False)

    def result(self, text: str) -> None:
        """Print what was asked for."""
        self.results.print(text, markup=False)

    def rows(self, pairs: dict[str, str]) -> None:
        """Print names and values in two aligned columns."""
        width = max(map(len, pairs)) + 2
        for name, value in pairs.items():
            self.result(f"{name:<{width}}{value}")

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """Print an aligned table: figures to the right, words to the left."""
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            cells = (
                f"{cell:>{w}}" if cell[:1].isdigit() else f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)
            )
            self.result("   ".join(cells).rstrip())

    def finish(self, result: dict[str, Any]) -> None:
        """The JSON line, where it was asked for."""
        if self.json_only and speaks_for_all():
            print(json.dumps(result), flush=True)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[..., None]]:
        """A function (done, total, detail, eta_seconds) that shows how far the work is."""
        live = self.stderr.is_terminal and _verbosity is Verbosity.NORMAL
        with _live_bar(self.stderr, title) if live else _lines(self, title) as update:
            yield update


@contextmanager
def _live_bar(console: Console, title: str) -> Iterator[Callable]:
    columns = [TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, detail="")

        def update(done: int, total: int, detail: str = "", eta_seconds: float | None = None) -> None:
            bar.update(task, completed=done, total=total, detail=_detail(detail, eta_seconds))

        yield update


@contextmanager
def _lines(output: Output, title: str) -> Iterator[Callable]:
    start = last = time.monotonic()

    def update(done: int, total: int, detail: str = "", eta_seconds: float | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        is_due = now - last >= SECONDS_BETWEEN_LINES or _verbosity is Verbosity.VERBOSE
        if done in (1, total) or is_due:
            last = now
            output.note(f"{title} {done}/{total}  {now - start:.0f} s  {_detail(detail, eta_seconds)}".rstrip())

    yield update


def _detail(detail: str, eta_seconds: float | None) -> str:
    return detail if eta_seconds is None else f"eta {duration(eta_seconds)}  {detail}"


def duration(seconds: float) -> str:
    """1:05:09, 4:07 or 12 s."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"


def fail(error: BaseException | str) -> None:
    """One sentence on stderr."""
    print(f"wandapp: {error}", file=sys.stderr)
