"""SparseGPT's column loop, literally."""

import torch
from torch import Tensor

from wandapp.kernels.select.reference import first_nonfinite, largest


def compensate_block_reference(
    weight: Tensor, factor: Tensor, *, n: int | None, m: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    rows, width = weight.shape
    used = weight.new_zeros(rows, width, dtype=torch.bool) if mask is None else mask.clone()
    error = weight.new_zeros(rows, width)
    diagonal = factor.diagonal()
    for c in range(width):
        if mask is None and c % m == 0:
            used[:, c : c + m] = largest(weight[:, c : c + m] ** 2 / diagonal[c : c + m] ** 2, n)
        kept = torch.where(used[:, c], weight[:, c], 0.0)
        error[:, c] = (weight[:, c] - kept) / diagonal[c]
        weight[:, c + 1 :] -= error[:, c, None] * factor[c, c + 1 :]
        weight[:, c] = kept
    return used, error, first_nonfinite(error)
