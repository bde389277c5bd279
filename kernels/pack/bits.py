"""Do the bits of a packed weight fit its values? The compiled kernels do not look: they would read what is not theirs."""

from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from wandapp.kernels.pack import Packed


def bitmask_fault(packed: "Packed") -> str | None:
    """Why the bits of `packed` do not fit its values and row offsets, or None. `check_packed` looks at sizes."""
    bitmask = packed.bitmask.numpy()
    rows, cols = packed.shape
    if cols % 8 and rows and (bitmask[:, -1] >> (cols % 8)).any():
        return f"the bitmask has bits beyond column {cols - 1}"
    if packed.pattern is not None and not bitmask.size:
        return None
    if packed.pattern is not None:
        n, m = packed.pattern
        return None if _holds_exactly(bitmask, cols, n, m) else f"the bitmask does not keep {n} of every {m} columns"
    offsets = packed.row_offsets.numpy()
    kept = numpy.bitwise_count(bitmask).sum(1, dtype=numpy.int64)
    if offsets[0] != 0 or not numpy.array_equal(offsets[1:], kept.cumsum()):
        return "the row offsets do not count the bits of the bitmask"
    if offsets[-1] != len(packed.values):
        return f"the bitmask has {offsets[-1]} bits for {len(packed.values)} values"
    return None


def _holds_exactly(bitmask: numpy.ndarray, cols: int, n: int, m: int) -> bool:
    """Whether every m consecutive columns have n bits."""
    if 8 % m == 0 and cols % 8 == 0:
        group = 0xFF >> (8 - m)
        return all((numpy.bitwise_count(bitmask >> shift & group) == n).all() for shift in range(0, 8, m))
    if m % 8 == 0:
        counts = numpy.bitwise_count(bitmask).reshape(len(bitmask), -1, m // 8)
    else:
        counts = numpy.unpackbits(bitmask, axis=1, count=cols, bitorder="little").reshape(len(bitmask), -1, m)
    return bool((counts.sum(-1, dtype=numpy.int64) == n).all())
