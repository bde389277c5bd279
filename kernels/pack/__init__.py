"""The packed form of a sparse weight: its kept values in row order, and one bit per weight that says where they go."""

from typing import NamedTuple

import torch
from torch import Tensor

from wandapp.errors import BackendUnavailableError, TooManyNonZerosError
from wandapp.kernels import dispatch
from wandapp.kernels.checks import WEIGHT_DTYPES, check_group, check_matrix, require, unit_column_stride
from wandapp.kernels.pack.bits import bitmask_fault


class Packed(NamedTuple):
    """A sparse [out_features, in_features] weight.

    values       n:m: [rows, cols * n / m]; unstructured: [number of non-zeros], rows one after another
    bitmask      [rows, ceil(cols / 8)] uint8, bit c % 8 of byte c // 8 = column c has a value, padding 0
    row_offsets  n:m: None; unstructured: [rows + 1] int64, row r holds values[row_offsets[r] : row_offsets[r + 1]]
    shape        (rows, cols) of the dense weight
    pattern      (n, m), or None when unstructured
    scale        None; of int8 values: [rows] fp32, the weight is scale[row] * value (`to_int8`)
    """

    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor | None
    shape: tuple[int, int]
    pattern: tuple[int, int] | None
    scale: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What is stored, None where the form has no such part: values, bitmask, row_offsets, scale."""
        return self.values, self.bitmask, self.row_offsets, self.scale

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)


def pack(weight: Tensor, *, n: int | None = None, m: int | None = None, backend: str | None = None) -> Packed:
    """Packed form of a sparse weight. -0.0 counts as zero and comes back as +0.0.

    n:m           the bitmask marks exactly n per group: all non-zeros, then the lowest zero columns
    unstructured  (n = m = None) the bitmask marks the non-zeros

    weight   [rows, cols] fp16, bf16 or fp32; cols divisible by m
    raises   WandappError on a shape, dtype or divisibility error; TooManyNonZerosError on a group of more than n:
             it names the first one's row and column, and how many there are
    """
    check_matrix("weight", weight)
    require((n is None) == (m is None), f"n and m go together, got n={n}, m={m}")
    pattern = None if n is None or m is None else (n, m)
    if pattern:
        check_group(*pattern, weight.shape[1])
    values, bitmask, row_offsets = _pack(unit_column_stride(weight), n, m, backend)
    return Packed(values, bitmask, row_offsets if n is None else None, (weight.shape[0], weight.shape[1]), pattern)


def unpack(
    packed: Packed, *, dtype: torch.dtype | None = None, backend: str | None = None, trusted: bool = False
) -> Tensor:
    """Dense weight [rows, cols] of a packed one, bit-equal to what was packed; of int8 values scale * value.

    dtype    of the result where the values are int8, None = float32; otherwise it is the values' own
    trusted  its bits are known to fit its values
    raises   WandappError when the parts of `packed` do not fit each other
    """
    check_packed(packed)
    own = torch.float32 if packed.scale is not None else packed.values.dtype
    dtype = dtype or own
    require(dtype in WEIGHT_DTYPES, f"a weight is float32, bfloat16 or float16, got {dtype}")
    require(packed.scale is not None or dtype == own, f"the values are {own} and unpack to that, got {dtype}")
    rows, cols = packed.shape
    n, m = packed.pattern or (None, None)
    return _unpack(
        packed.values, packed.bitmask, packed.row_offsets, packed.scale, rows, cols, n, m, dtype, trusted, backend
    )


def check_bits(packed: Packed) -> None:
    """The bits of `packed` fit its values; on a GPU that is taken on trust, where looking would need the CPU."""
    fault = bitmask_fault(packed) if packed.bitmask.device.type == "cpu" else None
    require(fault is None, f"a packed weight of shape {list(packed.shape)} does not fit together: {fault}")


def check_packed(packed: Packed) -> None:
    """The parts of `packed` fit each other in shape and dtype; the bits are trusted (see `check_bits`)."""
    rows, cols = packed.shape
    values, bitmask, row_offsets, scale = packed.parts
    require(
        all(part.is_contiguous() for part in packed.parts if part is not None),
        "the parts of a packed weight must be contiguous",
    )
    if scale is None:
        require(values.dtype in WEIGHT_DTYPES, f"values must be float32, bfloat16 or float16, got {values.dtype}")
    else:
        require(values.dtype == torch.int8, f"values with a scale must be int8, got {values.dtype}")
        require(
            scale.dtype == torch.float32 and tuple(scale.shape) == (rows,),
            f"scale must be float32 {[rows]}, got {scale.dtype} {list(scale.shape)}",
        )
    require(
        bitmask.dtype == torch.uint8 and tuple(bitmask.shape) == (rows, (cols + 7) // 8),
        f"bitmask must be uint8 {[rows, (cols + 7) // 8]}, got {bitmask.dtype} {list(bitmask.shape)}",
    )
    if packed.pattern is None:
        got = "none" if row_offsets is None else f"{row_offsets.dtype} {list(row_offsets.shape)}"
        require(
            row_offsets is not None and row_offsets.dtype == torch.int64 and tuple(row_offsets.shape) == (rows + 1,),
            f"an unstructured weight needs int64 row_offsets [{rows + 1}], got {got}",
        )
        require(values.dim() == 1, f"values of an unstructured weight must be 1-D, got shape {list(values.shape)}")
        return
    n, m = packed.pattern
    check_group(n, m, cols)
    expected = (rows, cols // m * n)
    require(tuple(values.shape) == expected, f"values must be {list(expected)}, got {list(values.shape)}")


def join_rows(parts: list[Packed]) -> Packed:
    """The packed weight whose rows are those of `parts`, one below the other; columns, dtype and pattern are alike."""
    if len(parts) == 1:
        return parts[0]
    require(
        len({part.values.dtype for part in parts}) == 1, "values of joined rows must be of one dtype; pack them anew"
    )
    values, bitmask = torch.cat([part.values for part in parts]), torch.cat([part.bitmask for part in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    row_offsets = None
    if parts[0].row_offsets is not None:
        counts = torch.cat([part.row_offsets.diff() for part in parts])
        row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = sum(part.shape[0] for part in parts)
    scale = torch.cat(scales) if scales else None
    return Packed(values, bitmask, row_offsets, (rows, parts[0].shape[1]), parts[0].pattern, scale)


# Launchers: `pack_<backend>(weight, *, n, m)` returns (values, bitmask, row_offsets or None, offender), where offender
# is the flat index row * cols + column of the first column of the first group with more than n non-zeros, else -1
# (an int or a 0-d integer tensor). `unpack_<backend>(packed, dtype)` returns the dense weight.


@torch.library.custom_op("wandapp::pack", mutates_args=())
def _pack(weight: Tensor, n: int | None, m: int | None, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    launch = dispatch.launcher("pack", weight.device, backend)
    values, bitmask, row_offsets, offender = launch(weight, n=n, m=m)
    index = int(offender)
    if index >= 0 and n is not None and m is not None:
        nonzeros = (weight != 0).reshape(len(weight), -1, m).sum(-1)  # counted only now: kernels look for the first
        crowded = int((nonzeros > n).sum())
        raise TooManyNonZerosError(*divmod(index, weight.shape[1]), n, m, crowded)
    if row_offsets is None:
        row_offsets = weight.new_empty(0, dtype=torch.int64)
    return values, bitmask, row_offsets


@_pack.register_fake
def _(weight: Tensor, n: int | None, m: int | None, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = weight.shape
    bitmask = weight.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    if n is not None:
        return weight.new_empty(rows, cols // m * n), bitmask, weight.new_empty(0, dtype=torch.int64)
    nonzeros = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(nonzeros), bitmask, weight.new_empty(rows + 1, dtype=torch.int64)


@torch.library.custom_op("wandapp::unpack", mutates_args=())
def _unpack(
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    scale: Tensor | None,
    rows: int,
    cols: int,
    n: int | None,
    m: int | None,
    dtype: torch.dtype,
    trusted: bool,
    backend: str | None,
) -> Tensor:
    packed = Packed(values, bitmask, row_offsets, (rows, cols), None if n is None or m is None else (n, m), scale)
    if not trusted:  # in here, because torch.compile cannot look into it
        check_bits(packed)
    dense = dispatch.launcher("unpack", values.device, backend)(packed, dtype)
    return dense if scale is None else dense.add_(0.0)  # a product may round to -0.0, which is no zero of ours


@_unpack.register_fake
def _(
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    scale: Tensor | None,
    rows: int,
    cols: int,
    n: int | None,
    m: int | None,
    dtype: torch.dtype,
    *_: object,
) -> Tensor:
    return values.new_empty(rows, cols, dtype=dtype)


def require_no_scale(packed: Packed, backend: str) -> None:
    """For backends without kernels of int8 values."""
    if packed.scale is not None:
        raise BackendUnavailableError(f"backend {backend!r} has no kernel for int8 values; unpack them first")
