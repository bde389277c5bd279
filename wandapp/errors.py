"""Errors a user can act on. Each is one sentence: the place, the rule, the value received, the way out."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path


class WandappError(ValueError):
    """Bad input or an unusable environment. The command line prints it and exits with 2."""

    is_of_one_rank = False  # of several ranks, all of which would otherwise say the same: the first one speaks


class BackendUnavailableError(WandappError):
    """A kernel backend was asked for by name and cannot run here."""


class NonFiniteScoreError(WandappError):
    """A pruning score is NaN or Inf, so no choice between weights is defined."""

    def __init__(self, row: int, column: int):
        super().__init__(
            f"score at row {row}, column {column} is NaN or Inf; the weight, the activations or the gradient there are "
            "not finite: check the checkpoint and use a wider --dtype"
        )
        self.row, self.column = row, column


class UnreachableSparsityError(WandappError):
    """A rule of choice cannot remove as many weights as it is asked to."""


class TooManyNonZerosError(WandappError):
    """A group of m consecutive weights holds more than n non-zeros."""

    def __init__(self, row: int, column: int, n: int, m: int, groups: int = 1):
        """`row` and `column` of the first of `groups` such groups."""
        others = f" (the first of {groups} such groups)" if groups > 1 else ""
        super().__init__(
            f"row {row}, columns {column}..{column + m - 1} hold more than {n} non-zeros{others}, which {n}:{m} does not "
            f"allow; prune with --sparsity {n}:{m} first"
        )
        self.row, self.column, self.groups = row, column, groups


def nearest(name: str, valid: Iterable[str], limit: int = 100) -> str:
    """Text that proposes the valid name closest to `name`, or lists the first `limit` of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name[:100], valid, n=1, cutoff=0.5)
    return (
        f"did you mean {close[0]!r}?"
        if close
        else f"valid: {', '.join(valid[:limit])}{', ...' if len(valid) > limit else ''}"
    )


def nearest_folder(folder: Path, more: Iterable[str] = ()) -> str:
    """Text that proposes the folder beside an absent one, or the name of `more`, that was probably meant; "" for none."""
    try:
        beside = [str(folder.with_name(path.name)) for path in folder.absolute().parent.iterdir() if path.is_dir()]
    except (OSError, ValueError):  # of a name that no folder can have
        beside = []
    close = difflib.get_close_matches(str(folder)[:200], [*beside, *more], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def compiled(expression: str, option: str = "--skip") -> re.Pattern:
    """The regular expression that a user gave as an option."""
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise WandappError(f"{option} {shorten(repr(expression))} is no regular expression, {error}") from None


def shorten(text: object, limit: int = 200) -> str:
    """`text` in at most `limit` characters, for a message that quotes what somebody else wrote."""
    text = str(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked this run to stop. The command line prints how to continue and exits with 3."""
