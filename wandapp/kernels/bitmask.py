"""Bitmasks of kept columns: bit c % 8 of byte c // 8 stands for column c, padding bits are 0."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 [rows, ceil(cols / 8)] from bool [rows, cols]."""
    rows, cols = mask.shape
    columns_of_byte = pad(mask.to(torch.uint8), (0, -cols % 8)).view(rows, (cols + 7) // 8, 8)
    place = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (columns_of_byte * place).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, cols: int) -> Tensor:
    """bool [rows, cols] from uint8 [rows, ceil(cols / 8)]."""
    place = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) >> place) & 1  # [rows, bytes, 8]
    return bits.flatten(1)[:, :cols].bool()
