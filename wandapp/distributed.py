"""The processes ("ranks") of one job, started by torchrun: each keeps its own samples, all hold the same weights.

`Ranks()` is one process alone: it sums over itself and speaks for itself, so no caller asks how many there are.
`join` gives the ranks of the job this process belongs to. A rank that fails ends the job: it leaves its reason in the
job's store, which every rank reads once a beat; a rank whose beats stop (a frozen or unreachable machine) is missed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wandapp.errors import WandappError

JOIN_TIMEOUT = timedelta(minutes=5)  # between the start of the first rank and of the last
COLLECTIVE_TIMEOUT = timedelta(days=1)  # ranks may wait for a slow one; those that are gone are missed by their beats
BEAT_SECONDS = 2.0
BEATS_MISSED = 15  # a rank that shows no sign of life for so many of its watcher's own beats counts as lost
GRACE_SECONDS = 10.0  # for a rank to end by itself after another one failed
_FAILURE = "failure"


class RankError(WandappError):
    """An error of one rank, named in it."""

    is_of_one_rank = True


@dataclass(frozen=True)
class Share:
    """Which of a job's samples a rank holds: ranks hold consecutive ones, in order.

    counts  samples of every rank
    """

    rank: int
    counts: tuple[int, ...]

    @property
    def start(self) -> int:
        return sum(self.counts[: self.rank])

    @property
    def rows(self) -> slice:
        """This rank's samples among all."""
        return slice(self.start, self.start + self.counts[self.rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    def leading(self, count: int) -> int:
        """How many of the job's first `count` samples this rank holds."""
        return min(max(count - self.start, 0), self.counts[self.rank])


def even_counts(samples: int, size: int) -> tuple[int, ...]:
    """`samples` dealt to `size` ranks: counts differ by at most one, and the first ranks have more."""
    return tuple(samples // size + (rank < samples % size) for rank in range(size))


class Ranks:
    """One process alone, and the interface of all ranks. Every rank must make the same calls in the same order."""

    rank, size = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor` (one shape and dtype), in place; bit-equal on all ranks."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any picklable object), in rank order, on all ranks."""
        return [value]

    def first(self, make: Callable[[], Any]) -> Any:
        """What `make()` returns on rank 0, or the WandappError it raises there, on all ranks."""
        return make()

    def deal(self, samples: int) -> slice:
        """This rank's part of `samples` samples."""
        return Share(self.rank, even_counts(samples, self.size)).rows

    def share(self, own: int) -> Share:
        """How the job's samples lie, from every rank's own number of them."""
        return Share(self.rank, tuple(self.gather(own)))

    def require_equal(self, checksum: Callable[[], str], what: str) -> None:
        """Raises, on all ranks, where one rank's checksum of `what` differs from that of rank 0."""

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def join(device: torch.device) -> Ranks:
    """The ranks of the job that torchrun (or any launcher that sets its variables) started; alone without one.

    Use it as a context: leaving it waits for all ranks; an error that leaves it ends every rank.

    device   where this rank computes: gloo joins tensors on the CPU, nccl those on GPUs
    raises   WandappError where the other ranks cannot be met
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_available():
        raise WandappError("this torch was built without torch.distributed; start one process, without torchrun")
    return _Job(device)


def program() -> str:
    """What starts a job like this one, up to the command's name."""
    ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks == 1:
        return "wandapp"
    machines = f"--nnodes {ranks // here} ... " if ranks > here else ""
    return f"torchrun {machines}--nproc-per-node {here} -m wandapp"


class _Job(Ranks):
    """More than one rank, joined by torch.distributed."""

    def __init__(self, device: torch.device):
        try:
            store, self.rank, self.size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
            store = dist.PrefixStore(_attempt(self.size), store)
            self._pulse = _Pulse(store.clone(), self.rank, self.size)  # type: ignore[attr-defined]  # missing in its stub
            self._pulse.start()
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=COLLECTIVE_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RankError(f"the ranks cannot meet ({reason}); start them with torchrun --nproc-per-node N") from error
        self.sum_(torch.zeros(1))  # none goes on, and perhaps ends, while others are still on their way to it

    def sum_(self, tensor: Tensor) -> Tensor:
        with _lost_rank_named():
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with _lost_rank_named():
            dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], Any]) -> Any:
        outcome: list[Any] = [None, None]  # result, what went wrong
        if self.is_first:
            try:
                outcome[0] = make()
            except WandappError as error:
                outcome[1] = str(error)
        with _lost_rank_named():
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise WandappError(outcome[1])
        return outcome[0]

    def require_equal(self, checksum: Callable[[], str], what: str) -> None:
        checksums = self.gather(checksum())
        different = [rank for rank, value in enumerate(checksums) if value != checksums[0]]
        if different:
            raise WandappError(
                f"{what}: rank {different[0]} computed other weights than rank 0; give all ranks the same hardware, "
                "library versions and thread count, then run again with --resume"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for all ranks, or tells them why not. Only one rank lets its error through: the others exit with 2."""
        if error is None:
            try:
                self.gather(None)
            except WandappError as lost:
                error = lost
        is_first_to_fail = error is not None and self._pulse.tell(error)
        self._pulse.stop()
        if error is None:
            dist.destroy_process_group()
        elif not isinstance(error, Exception):
            pass  # interrupted, as all ranks are; rank 0 says how to go on
        elif not is_first_to_fail:
            raise SystemExit(2) from error
        elif isinstance(error, WandappError):
            raise error if self.is_first else RankError(f"rank {self.rank}: {error}") from error


def _attempt(size: int) -> str:
    """Keeps a job that torchrun restarts (--max-restarts) from reading what its earlier attempt left in the store.

    On one machine torchrun keeps the store and counts for all ranks; on several each attempt gets a new store.
    """
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    return f"wandapp-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_one_machine else ''}"


@contextmanager
def _lost_rank_named() -> Iterator[None]:
    """torch.distributed reports a peer that is gone in its transport's words."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition("] ")[2].partition(". ")[0] or type(error).__name__
        raise WandappError(
            f"the connection to another rank was lost ({reason}); its own message, if any, says why; finished blocks are "
            "kept: run again with --resume"
        ) from error


class _Pulse(threading.Thread):
    """Shows the others that this rank is alive, watches the next rank, and ends this process once the job has failed."""

    def __init__(self, store: Any, rank: int, size: int):
        super().__init__(daemon=True, name="wandapp-pulse")
        self.store, self.rank, self.watched = store, rank, (rank + 1) % size
        self._stopped = threading.Event()

    def run(self) -> None:
        seen, missed = 0, 0
        while True:
            try:
                self.store.add(f"beat/{self.rank}", 1)
                beats = self.store.add(f"beat/{self.watched}", 0)
                seen, missed = beats, missed + 1 if beats == seen and beats else 0
                if missed == BEATS_MISSED and self._claim(f"rank {self.watched} stopped answering"):
                    print(
                        f"wandapp: rank {self.watched} stopped answering {missed * BEAT_SECONDS:.0f} s ago; finished "
                        "blocks are kept: run again with --resume",
                        file=sys.stderr,
                        flush=True,
                    )
                failed = self.store.check([_FAILURE])
            except RuntimeError:  # the store lives in rank 0 or its launcher: that is gone, and the job with it
                failed = True
            if failed and not self._stopped.wait(GRACE_SECONDS):
                os._exit(2)  # the main thread may be waiting, for ever, for a rank that is gone
            if self._stopped.wait(BEAT_SECONDS):
                return

    def tell(self, error: BaseException) -> bool:
        """Whether this rank is the first to fail. All of them often fail alike: then rank 0 is to speak."""
        try:
            if self.rank and not isinstance(error, KeyboardInterrupt):
                time.sleep(BEAT_SECONDS / 2)
            return self._claim(f"rank {self.rank}: {error}")
        except RuntimeError:
            return self.rank == 0

    def _claim(self, reason: str) -> bool:
        return not self.store.check([_FAILURE]) and self.store.compare_set(_FAILURE, "", reason).decode() == reason

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=GRACE_SECONDS)
