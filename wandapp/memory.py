"""Memory: what is free, what this process takes, and how the C library's allocator treats the pages of freed tensors.

By default glibc maps every large block anew and gives it back when it is freed: each activation then costs a page fault
per 4 KiB, and each release interrupts the other cores. Where blocks of a few megabytes come and go at every product,
that is a tenth of the time. Nothing here does anything on a C library without these functions.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MADV_DONTNEED = 4  # sys/mman.h
_CGROUP = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 128 << 10}
# 32 MiB is the largest that glibc takes; larger tensors belong to products that dwarf their page faults.
_KEEPING = {_TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}


@contextmanager
def kept_pages() -> Iterator[None]:
    """While the body runs, freed blocks of up to 32 MiB stay with the process for the next tensor; given back after."""
    _set(_KEEPING)
    try:
        yield
    finally:
        _set(_DEFAULTS)
        give_back()


def give_back() -> None:
    """Returns free pages to the operating system, which glibc would keep."""
    if trim := _function("malloc_trim"):
        trim(0)


def drop_pages(tensor: Any) -> None:
    """Takes the pages of a tensor that is mapped from a file out of this process's memory; the file keeps its contents."""
    if madvise := _function("madvise"):
        madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), _MADV_DONTNEED)


def _set(values: dict[int, int]) -> None:
    if mallopt := _function("mallopt"):
        for option, value in values.items():
            mallopt(option, value)


def _function(name: str) -> Any | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def free_bytes() -> int:
    """Memory that this process may still take: what the system has, or what its container leaves it."""
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def resident_bytes() -> int:
    """Memory of this process at this moment."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Highest resident memory of this program so far.

    Where /proc tells: getrusage also counts what the process held before it became this program, a large parent's pages.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None
