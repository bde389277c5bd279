"""Packing, literally."""

import torch
from torch import Tensor

from wandapp.kernels.bitmask import pack_bits, unpack_bits
from wandapp.kernels.pack import Packed
from wandapp.kernels.select.reference import largest


def pack_reference(weight: Tensor, *, n: int | None, m: int | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
    rows, cols = weight.shape
    weight = torch.where(weight == 0, 0.0, weight)  # -0.0 becomes +0.0
    nonzero = weight != 0
    if n is None or m is None:
        row_offsets = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
        row_offsets[1:] = nonzero.sum(1).cumsum(0)
        return weight[nonzero], pack_bits(nonzero), row_offsets, -1
    groups = nonzero.view(rows, cols // m, m)
    crowded = (groups.sum(-1) > n).flatten().nonzero()
    mask = largest(groups.byte(), n).view(rows, cols)
    offender = int(crowded[0]) * m if len(crowded) else -1
    return weight[mask].view(rows, cols // m * n), pack_bits(mask), None, offender


def unpack_reference(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    rows, cols = packed.shape
    dense = packed.values.new_zeros(rows, cols)
    dense[unpack_bits(packed.bitmask, cols)] = packed.values.flatten()
    return dense if packed.scale is None else (packed.scale[:, None] * dense).to(dtype)
