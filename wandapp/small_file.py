"""Reads a file that somebody else wrote and that must be small: recipes, manifests, configurations."""

import errno
import os
import stat
from pathlib import Path


def read_small(path: str | Path, limit: int) -> bytes:
    """The content of a file, cut behind `limit` + 1 bytes, by which its reader knows that there is more.

    raises  OSError as open does, and on a pipe, a socket or a device, which may have no end or never begin
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "neither a file nor a folder")
        return file.read(limit + 1)


def _without_waiting(path: str, flags: int) -> int:
    """A pipe is opened at once, where open would wait for whoever writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)
