"""Score and choice in C++: one read of the weight, scores in registers or in cache."""

import torch
from torch import Tensor

from wandapp import _C
from wandapp.kernels.native import DTYPE_CODES, address, instruction_set

# terms: column_scale [cols] and gradient [rows, cols], fp32, or None


def select_nm_cpu(
    weight: Tensor, *terms: Tensor | None, n: int, m: int, alpha: float, isa: str | None = None
) -> tuple[Tensor, int]:
    mask = torch.empty(weight.shape, dtype=torch.bool)
    return mask, _C.select_nm(_terms(weight, *terms, alpha=alpha), address(mask), False, 0, n, m, *_how(isa))


def select_rows_cpu(
    weight: Tensor, *terms: Tensor | None, keep: int, alpha: float, isa: str | None = None
) -> tuple[Tensor, int]:
    mask = torch.empty(weight.shape, dtype=torch.bool)
    return mask, _C.select_rows(_terms(weight, *terms, alpha=alpha), address(mask), False, keep, *_how(isa))


def prune_nm_cpu(
    weight: Tensor, *terms: Tensor | None, n: int, m: int, alpha: float, isa: str | None = None
) -> tuple[Tensor, int]:
    bitmask = _empty_bitmask(weight)
    return bitmask, _C.select_nm(_terms(weight, *terms, alpha=alpha), address(bitmask), True, 0, n, m, *_how(isa))


def prune_pack_nm_cpu(
    weight: Tensor, *terms: Tensor | None, n: int, m: int, alpha: float, isa: str | None = None
) -> tuple[Tensor, Tensor, int]:
    bitmask, values = _empty_bitmask(weight), weight.new_empty(weight.shape[0], weight.shape[1] // m * n)
    where = (address(bitmask), True, address(values))
    return values, bitmask, _C.select_nm(_terms(weight, *terms, alpha=alpha), *where, n, m, *_how(isa))


def prune_rows_cpu(
    weight: Tensor, *terms: Tensor | None, keep: int, alpha: float, isa: str | None = None
) -> tuple[Tensor, int]:
    bitmask = _empty_bitmask(weight)
    return bitmask, _C.select_rows(_terms(weight, *terms, alpha=alpha), address(bitmask), True, keep, *_how(isa))


def _how(isa: str | None) -> tuple[int, str]:
    return torch.get_num_threads(), instruction_set(isa)


def _empty_bitmask(weight: Tensor) -> Tensor:
    rows, cols = weight.shape
    return torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)


def _terms(weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, *, alpha: float) -> _C.ScoreTerms:
    return _C.ScoreTerms(
        weight=address(weight),
        weight_stride=weight.stride(0),
        dtype=DTYPE_CODES[weight.dtype],
        scale=address(column_scale),
        gradient=address(gradient),
        gradient_stride=0 if gradient is None else gradient.stride(0),
        alpha=alpha,
        rows=weight.shape[0],
        cols=weight.shape[1],
    )
