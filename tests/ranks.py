"""Ranks on this machine for tests: forked processes that meet over loopback, as torchrun's would, without a new interpreter."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wandapp.console import fail
from wandapp.distributed import Ranks, join
from wandapp.errors import WandappError


class Ended(NamedTuple):
    """How one rank ended: its exit code (-9 where SIGKILL ended it), what it returned, what it printed.

    said   the sentences that a user reads; torch prints frames of its own when the store's rank is gone
    """

    code: int
    result: Any
    printed: str

    @property
    def said(self) -> list[str]:
        return [line.removeprefix("wandapp: ") for line in self.printed.splitlines() if line.startswith("wandapp: ")]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(size: int, work: Callable[[Ranks], Any], folder: Path, timeout: float = 60.0) -> list[Ended]:
    """Runs work(ranks) in `size` processes; results travel as files in `folder`. A rank that hangs fails the test."""
    port, deadline = free_port(), time.monotonic() + timeout
    processes = {rank: _fork(rank, size, port, work, folder) for rank in range(size)}
    codes: dict[int, int] = {}
    while len(codes) < size and time.monotonic() < deadline:
        for rank, process in processes.items():
            if rank not in codes and (done := os.waitpid(process, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.01)
    hanging = [rank for rank in range(size) if rank not in codes]
    for rank in hanging:
        os.kill(processes[rank], 9)
        os.waitpid(processes[rank], 0)
    assert not hanging, f"ranks {hanging} were still there after {timeout} s"
    return [_ended(rank, codes[rank], folder) for rank in range(size)]


def _fork(rank: int, size: int, port: int, work: Callable[[Ranks], Any], folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        with join(torch.device("cpu")) as ranks:
            torch.save(work(ranks), folder / f"rank{rank}.pt")
        code = 0
    except WandappError as error:  # as the command line does
        if rank == 0 or error.is_of_one_rank:
            fail(error)
        code = 2
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 98
    finally:
        sys.stderr.flush()
        os._exit(code)


def _ended(rank: int, code: int, folder: Path) -> Ended:
    saved = folder / f"rank{rank}.pt"
    result = torch.load(saved, weights_only=False) if code == 0 else None
    return Ended(code, result, (folder / f"rank{rank}.log").read_text())
