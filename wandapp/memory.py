"""How the C library's allocator treats the pages of freed tensors.

By default glibc maps every large block anew and gives it back when it is freed: each activation then costs a page fault
per 4 KiB, and each release interrupts the other cores. Where blocks of a few megabytes come and go at every product,
that is a tenth of the time. Nothing here does anything on a C library without these functions.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


def _set(values: dict[int, int]) -> None:
    if mallopt := _function("mallopt"):
        for option, value in values.items():
            mallopt(option, value)


def _function(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
