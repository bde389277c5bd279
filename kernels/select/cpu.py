"""Score and choice in C++: one read of the weight, scores in registers or in cache."""

import torch
from torch import Tensor

from wandapp import _C
from wandapp.kernels.native import DTYPE_CODES, address, instruction_set


def select_nm_cpu(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    n: int,
    m: int,
    alpha: float,
    isa: str | None = None,
) -> tuple[Tensor, int]:
    mask, terms = torch.empty(weight.shape, dtype=torch.bool), _terms(weight, column_scale, gradient, alpha)
    return mask, _C.select_nm(terms, address(mask), False, 0, n, m, torch.get_num_threads(), instruction_set(isa))


def select_rows_cpu(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    keep: int,
    alpha: float,
    isa: str | None = None,
) -> tuple[Tensor, int]:
    mask, terms = torch.empty(weight.shape, dtype=torch.bool), _terms(weight, column_scale, gradient, alpha)
    return mask, _C.select_rows(terms, address(mask), False, keep, torch.get_num_threads(), instruction_set(isa))


def prune_nm_cpu(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    n: int,
    m: int,
    alpha: float,
    isa: str | None = None,
) -> tuple[Tensor, int]:
    bitmask, terms = _empty_bitmask(weight), _terms(weight, column_scale, gradient, alpha)
    return bitmask, _C.select_nm(terms, address(bitmask), True, 0, n, m, torch.get_num_threads(), instruction_set(isa))


def prune_pack_nm_cpu(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    n: int,
    m: int,
    alpha: float,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, int]:
    bitmask, terms = _empty_bitmask(weight), _terms(weight, column_scale, gradient, alpha)
    values = weight.new_empty(weight.shape[0], weight.shape[1] // m * n)
    where = (address(bitmask), True, address(values))
    return values, bitmask, _C.select_nm(terms, *where, n, m, torch.get_num_threads(), instruction_set(isa))


def prune_rows_cpu(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    keep: int,
    alpha: float,
    isa: str | None = None,
) -> tuple[Tensor, int]:
    bitmask, terms = _empty_bitmask(weight), _terms(weight, column_scale, gradient, alpha)
    return bitmask, _C.select_rows(terms, address(bitmask), True, keep, torch.get_num_threads(), instruction_set(isa))


def _empty_bitmask(weight: Tensor) -> Tensor:
    rows, cols = weight.shape
    return torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)


def _terms(weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, alpha: float) -> _C.ScoreTerms:
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
