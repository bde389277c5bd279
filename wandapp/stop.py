"""SIGINT and SIGTERM as an exception of our choice, also where a library puts another one in its place."""

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Stoppable:
    """A context in which SIGINT and SIGTERM raise make(the signal's name); off the main thread it changes nothing.

    Python runs a handler between any two steps, also while C code waits for a callback's result. Such code may drop the
    exception and raise one of its own (torch: "could not determine the shape of object"): what leaves this context after a
    signal is the signal's exception all the same.
    """

    def __init__(self, make: Callable[[str], BaseException]):
        self.make = make
        self.asked: BaseException | None = None
        self._before: dict[signal.Signals, Any] = {}  # handlers

    def __enter__(self) -> "Stoppable":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _stop(self, number: int, frame: object) -> None:
        self.asked = self.make(signal.Signals(number).name)
        raise self.asked

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is not None and self.asked is not None and error is not self.asked:
            raise self.asked from error
