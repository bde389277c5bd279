"""int8 storage of a packed weight: a byte per kept value and one fp32 scale per row. Lossy; 2:4 takes 0.625 byte a weight."""

import torch
from torch import Tensor

from wandapp.kernels.checks import WEIGHT_DTYPES, require
from wandapp.kernels.pack import Packed, check_packed

LARGEST = 127  # symmetric: -128 is never used


def to_int8(packed: Packed) -> Packed:
    """`packed` with its values in int8, rounded to the nearest multiple of their row's scale.

    scale_r = max_c |W_rc| / 127        q_rc = round(W_rc / scale_r), ties to even        W_rc ~ scale_r * q_rc

    So no weight moves by more than half a scale, and zeros stay zeros. A row of zeros has scale 0.

    packed   values fp16, bf16 or fp32
    raises   WandappError where the values are int8 already, or hold NaN or Inf
    """
    check_packed(packed)
    values = packed.values
    require(values.dtype in WEIGHT_DTYPES, f"values must be float32, bfloat16 or float16, got {values.dtype}")
    largest = _largest_of_rows(packed)
    require(bool(largest.isfinite().all()), "int8 has no NaN and no Inf, and the weight holds one; prune it again")
    # A row of denormals may have no such quotient: the smallest step of fp32 then stores it exactly.
    scale = torch.where(largest > 0, (largest / LARGEST).clamp_min(2.0**-149), 0.0)
    divisor = _for_each_value(torch.where(scale > 0, scale, 1.0), packed)
    quotients = (values.float() / divisor).round_().clamp_(-LARGEST, LARGEST)
    return packed._replace(values=quotients.to(torch.int8), scale=scale)


def relative_error(packed: Packed, rounded: Packed) -> float:
    """||W - W'|| / ||W|| (Frobenius) for `rounded` = to_int8(packed); 0 for a weight of zeros."""
    exact = packed.values.float()
    error = exact - _for_each_value(rounded.scale, rounded) * rounded.values
    size = exact.norm(dtype=torch.float64)
    return float(error.norm(dtype=torch.float64) / size) if size else 0.0


def _largest_of_rows(packed: Packed) -> Tensor:
    """max_c |W_rc|, fp32 [rows]."""
    size = packed.values.float().abs()
    if not size.numel():
        return size.new_zeros(packed.shape[0])
    if packed.row_offsets is None:
        return size.amax(1)
    counts = packed.row_offsets.diff()
    return torch.segment_reduce(size, "max", lengths=counts, initial=0.0)


def _for_each_value(of_row: Tensor, packed: Packed) -> Tensor:
    """[rows] as it multiplies `packed.values`."""
    if packed.row_offsets is None:
        return of_row[:, None]
    return of_row.repeat_interleave(packed.row_offsets.diff())
