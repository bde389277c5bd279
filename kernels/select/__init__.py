"""Fused score and choice: which weights stay, by n of every m inputs or by `keep` of every row.

`select_*` return a bool mask, `prune_*_` zero the removed weights in place and return a bitmask, `prune_pack_nm_` the whole
packed form. All read the weight once: scores live in registers or in a row buffer that stays in cache, never in memory.
"""

import torch
from torch import Tensor

from wandapp.errors import NonFiniteScoreError
from wandapp.kernels import dispatch
from wandapp.kernels.checks import check_group, check_like, check_matrix, check_writable, require, unit_column_stride
from wandapp.kernels.pack import Packed


def select_nm(
    weight: Tensor,
    column_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    n: int,
    m: int,
    alpha: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Mask that keeps, in every m consecutive inputs, the n weights with the largest score.

    score_ij = |weight_ij| * (alpha * gradient_ij + column_scale_j)            (Wanda++, arXiv:2503.04992)
    Equal scores: the lower column index is kept, in every backend. Scores are formed in fp32.

    weight        [rows, cols] fp16, bf16 or fp32; cols divisible by m
    column_scale  [cols] fp32, >= 0; None means 1
    gradient      [rows, cols] fp32, >= 0; None means 0
    returns       [rows, cols] bool, True = keep, exactly n True per group
    raises        WandappError on a shape, dtype or divisibility error; NonFiniteScoreError on a NaN or Inf score
    """
    terms = _checked_terms(weight, column_scale, gradient, group=(n, m))
    return _select_nm(unit_column_stride(weight), *terms, n, m, alpha, backend)


def select_rows(
    weight: Tensor,
    column_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    keep: int,
    alpha: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Mask that keeps, in every row, the `keep` weights with the largest score.

    The score, its ties and the arguments are those of `select_nm`. For one group per matrix pass `weight.view(1, -1)`.

    keep     0 <= keep <= cols
    returns  [rows, cols] bool, True = keep, exactly `keep` True per row
    raises   WandappError on a shape, dtype or range error; NonFiniteScoreError on a NaN or Inf score
    """
    terms = _checked_terms(weight, column_scale, gradient, keep=keep)
    return _select_rows(unit_column_stride(weight), *terms, keep, alpha, backend)


def prune_nm_(
    weight: Tensor,
    column_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    n: int,
    m: int,
    alpha: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Bitmask of `select_nm`'s choice, after the removed weights were set to +0.0 in place.

    Kept weights stay bit-equal, except that -0.0 becomes +0.0.

    weight   [rows, cols], unit column stride, any row stride; the other arguments are those of `select_nm`
    returns  [rows, ceil(cols / 8)] uint8: bit c % 8 of byte c // 8 is 1 where column c is kept, padding 0
    raises   as `select_nm`; after a NonFiniteScoreError part of the weight may already be pruned
    """
    terms = _checked_terms(weight, column_scale, gradient, group=(n, m), in_place=True)
    return _prune_nm_(weight, *terms, n, m, alpha, backend)


def prune_pack_nm_(
    weight: Tensor,
    column_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    n: int,
    m: int,
    alpha: float = 0.0,
    backend: str | None = None,
) -> Packed:
    """Packed form of what `prune_nm_` leaves of the weight, made in the same pass; bit-equal to `pack` afterwards.

    The chosen n of a group are the places that `pack` stores: a zero among them scores 0 and was chosen only because
    every weight left out scores 0 too, at a higher column.

    weight   as for `prune_nm_`: the removed weights are set to +0.0 in place; the other arguments too
    raises   as `prune_nm_`
    """
    terms = _checked_terms(weight, column_scale, gradient, group=(n, m), in_place=True)
    values, bitmask = _prune_pack_nm_(weight, *terms, n, m, alpha, backend)
    return Packed(values, bitmask, None, tuple(weight.shape), (n, m))


def prune_rows_(
    weight: Tensor,
    column_scale: Tensor | None = None,
    gradient: Tensor | None = None,
    *,
    keep: int,
    alpha: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Bitmask of `select_rows`' choice, after the removed weights were set to +0.0 in place.

    Kept weights stay bit-equal, except that -0.0 becomes +0.0.

    weight   [rows, cols], unit column stride, any row stride; the other arguments are those of `select_rows`
    returns  [rows, ceil(cols / 8)] uint8: bit c % 8 of byte c // 8 is 1 where column c is kept, padding 0
    raises   as `select_rows`; after a NonFiniteScoreError part of the weight may already be pruned
    """
    terms = _checked_terms(weight, column_scale, gradient, keep=keep, in_place=True)
    return _prune_rows_(weight, *terms, keep, alpha, backend)


# Launchers `<function>_<backend>(weight, column_scale, gradient, *, n, m | keep, alpha)` return (mask or bitmask,
# flat index row * cols + column of the first score that is NaN or Inf, else -1; an int or a 0-d integer tensor); those of
# `prune_pack_nm_` return the values before the bitmask.


@torch.library.custom_op("wandapp::select_nm", mutates_args=())
def _select_nm(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    n: int,
    m: int,
    alpha: float,
    backend: str | None,
) -> Tensor:
    launch = dispatch.launcher("select_nm", weight.device, backend)
    return _finite(weight, *launch(weight, column_scale, gradient, n=n, m=m, alpha=alpha))


@torch.library.custom_op("wandapp::select_rows", mutates_args=())
def _select_rows(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, keep: int, alpha: float, backend: str | None
) -> Tensor:
    launch = dispatch.launcher("select_rows", weight.device, backend)
    return _finite(weight, *launch(weight, column_scale, gradient, keep=keep, alpha=alpha))


@torch.library.custom_op("wandapp::prune_nm_", mutates_args=("weight",))
def _prune_nm_(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    n: int,
    m: int,
    alpha: float,
    backend: str | None,
) -> Tensor:
    launch = dispatch.launcher("prune_nm_", weight.device, backend)
    return _finite(weight, *launch(weight, column_scale, gradient, n=n, m=m, alpha=alpha))


@torch.library.custom_op("wandapp::prune_rows_", mutates_args=("weight",))
def _prune_rows_(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, keep: int, alpha: float, backend: str | None
) -> Tensor:
    launch = dispatch.launcher("prune_rows_", weight.device, backend)
    return _finite(weight, *launch(weight, column_scale, gradient, keep=keep, alpha=alpha))


@torch.library.custom_op("wandapp::prune_pack_nm_", mutates_args=("weight",))
def _prune_pack_nm_(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    n: int,
    m: int,
    alpha: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    launch = dispatch.launcher("prune_pack_nm_", weight.device, backend)
    values, *rest = launch(weight, column_scale, gradient, n=n, m=m, alpha=alpha)
    return values, _finite(weight, *rest)


@_select_nm.register_fake
@_select_rows.register_fake
def _(weight: Tensor, *_: object) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool, memory_format=torch.contiguous_format)


@_prune_nm_.register_fake
@_prune_rows_.register_fake
def _(weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty(weight.shape[0], (weight.shape[1] + 7) // 8, dtype=torch.uint8)


@_prune_pack_nm_.register_fake
def _(
    weight: Tensor, column_scale: Tensor | None, gradient: Tensor | None, n: int, m: int, *_: object
) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    return weight.new_empty(rows, cols // m * n), weight.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)


def _finite(weight: Tensor, result: Tensor, offender: int | Tensor) -> Tensor:
    index = int(offender)
    if index >= 0:
        raise NonFiniteScoreError(*divmod(index, weight.shape[1]))
    return result


def _checked_terms(
    weight: Tensor,
    column_scale: Tensor | None,
    gradient: Tensor | None,
    *,
    group: tuple[int, int] | None = None,
    keep: int = 0,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """column_scale and gradient as the launchers take them, after everything was found to fit the weight."""
    check_matrix("weight", weight)
    cols = weight.shape[1]
    check_like("column_scale", column_scale, (cols,), weight.device)
    check_like("gradient", gradient, tuple(weight.shape), weight.device)
    if group is not None:
        check_group(*group, cols)
    require(0 <= keep <= cols, f"keep must lie in 0..{cols} (the columns), got {keep}")
    if in_place:
        check_writable("weight", weight)
    return unit_column_stride(column_scale), unit_column_stride(gradient)
