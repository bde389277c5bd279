"""From the packed 2:4 form to torch's semi-structured tensors, which multiply many tokens on the sparse tensor cores.

Two libraries stand behind them: CUTLASS on compute capability 8.x and cuSPARSELt from 9.0 on. Both take the kept values
in row order, and metadata: one nibble per group, `first | second << 2`, four nibbles to a 16-bit word, low first. They
differ in the order of the words. Both build tiles of 32 rows x 2 words; in a tile, with row = 16 a + 8 b + c, word w:

    word number  8 c + 4 a + 2 w + b

CUTLASS lays tiles column after column. cuSPARSELt's order is not documented; we assume 4 x 2 tiles grouped to 128 rows x
64 columns and ask the library (`knows_cusparselt_order`). An H100 with cuSPARSELt 0.8.0 said no: there, and wherever the
answer is no, `torch._cslt_compress` makes the metadata.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from wandapp.kernels.checks import require
from wandapp.kernels.pack import Packed, check_packed, pack, unpack

PROBE_SHAPES = ((128, 128), (256, 384))


def to_torch_semi_structured(weight: Any) -> Tensor:
    """A torch semi-structured tensor, usable as weight of F.linear, from a Packed or a module with one as `packed`.

    Never builds a dense weight, except on a GPU whose cuSPARSELt orders its metadata otherwise than we know: one then.
    raises  WandappError on another pattern, dtype, shape or device than the library takes
    """
    packed = getattr(weight, "packed", weight)
    check_packed(packed)
    rows, cols = packed.shape
    require(packed.pattern == (2, 4), f"torch's semi-structured tensors are 2:4, got pattern {packed.pattern}")
    require(packed.values.is_cuda, f"torch's semi-structured tensors live on a GPU, got {packed.values.device}")
    is_ampere = torch.cuda.get_device_capability(packed.values.device)[0] == 8
    library = SparseSemiStructuredTensorCUTLASS if is_ampere else SparseSemiStructuredTensorCUSPARSELT
    limits = library._DTYPE_SHAPE_CONSTRAINTS[torch.float16]
    require(
        packed.values.dtype in (torch.float16, torch.bfloat16)
        and rows % limits.sparse_min_rows == 0
        and cols % limits.sparse_min_cols == 0,
        f"{library.BACKEND} takes float16 or bfloat16 with rows divisible by {limits.sparse_min_rows} and columns by "
        f"{limits.sparse_min_cols}, got {packed.values.dtype} {[rows, cols]}",
    )
    values, metadata = cutlass_layout(packed) if is_ampere else (cusparselt_blob(packed), None)
    return library(torch.Size(packed.shape), values, metadata, None, None, None)


def cutlass_layout(packed: Packed) -> tuple[Tensor, Tensor]:
    """(values [rows, cols / 2], metadata int16 [rows, cols / 16]), bit-equal to torch's from the dense weight."""
    values, words = values_and_words(packed)
    return values, tiled(words).flatten(end_dim=1).reshape(words.shape)


def cusparselt_blob(packed: Packed) -> Tensor:
    """cuSPARSELt's compressed matrix [rows, 9 cols / 16]: all values, then all metadata."""
    rows, cols = packed.shape
    dtype, device = packed.values.dtype, packed.values.device
    if rows % 128 or cols % 128 or not knows_cusparselt_order(device, dtype):
        return torch._cslt_compress(unpack(packed, trusted=True))
    return ordered_blob(packed)


def share_with_blob(packed: Packed) -> tuple[Packed, Tensor]:
    """cuSPARSELt's form of a weight, and the same weight with its values lying in there where the library lets them be.

    Both together then take 10/16 of the dense 16-bit weight. Where the library keeps values otherwise than row by row,
    which no one promises, the weight comes back as it was and the two together take 18/16.
    """
    blob = cusparselt_blob(packed)
    ordered = torch_ordered(packed)
    values = blob.flatten()[: ordered.values.numel()].view_as(ordered.values)
    shares = torch.equal(values.view(torch.int16), ordered.values.view(torch.int16))
    return (ordered._replace(values=values) if shares else packed), blob


def cusparselt_obstacle(packed: Packed) -> str:
    """Why cuSPARSELt cannot multiply this weight; empty when it can."""
    rows, cols = packed.shape
    if not (packed.values.is_cuda and torch.backends.cusparselt.is_available()):
        return "it needs a GPU and a torch with cuSPARSELt"
    limits = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[torch.float16]
    fits = rows % limits.sparse_min_rows == 0 and cols % limits.sparse_min_cols == 0
    if packed.pattern != (2, 4) or packed.values.element_size() != 2 or not fits:
        return (
            f"it takes 2:4 weights of 16 bits with rows divisible by {limits.sparse_min_rows} and columns by "
            f"{limits.sparse_min_cols}"
        )
    return ""


def ordered_blob(packed: Packed) -> Tensor:
    rows, cols = packed.shape
    values, words = values_and_words(packed)
    tiles = tiled(words).view(cols // 64, 2, rows // 128, 4, 64)  # a super-tile holds tiles of 2 columns, 4 rows
    metadata = tiles.transpose(1, 2).flatten()
    return torch.cat([values.view(torch.int16).flatten(), metadata]).view(values.dtype).view(rows, -1)


def knows_cusparselt_order(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether random 2:4 matrices that the library compresses here equal ours bit for bit; asked once per process."""
    return _probe(device, dtype, torch.cuda.get_device_capability(device), torch.backends.cusparselt.version())


@cache
def _probe(device: torch.device, dtype: torch.dtype, capability: tuple[int, int], version: int | None) -> bool:
    generator = torch.Generator(device).manual_seed(0)
    for rows, cols in PROBE_SHAPES:
        order = torch.rand(rows, cols // 4, 4, device=device, generator=generator).argsort(-1)
        size = torch.rand(rows, cols, device=device, generator=generator) + 1
        weight = torch.where(order.view(rows, cols) < 2, size, 0.0).to(dtype)
        theirs, ours = torch._cslt_compress(weight), ordered_blob(pack(weight, n=2, m=4))
        if not torch.equal(theirs.flatten().view(torch.int16), ours.flatten().view(torch.int16)):
            return False
    return True


def torch_ordered(packed: Packed) -> Packed:
    """The same 2:4 weight, by torch's rule for empty places.

    The packed form fills a group of fewer than two non-zeros from the lowest column, torch's converters otherwise, so
    such groups are written anew: each place of the new pair takes the value that stands at that column, or zero.
    """
    rows, cols = packed.shape
    tables = torch.tensor([PAIR_OF_MASK, TORCH_PAIR], dtype=torch.uint8, device=packed.values.device)
    old = tables[0][_nibbles(packed.bitmask, cols).int()]  # [rows, groups]
    first, second = packed.values.view(rows, cols // 4, 2).unbind(-1)
    nonzero = (first != 0).to(torch.uint8) << (old & 3) | (second != 0).to(torch.uint8) << (old >> 2)
    new = tables[1][nonzero.int()]
    zero = torch.zeros((), dtype=first.dtype, device=first.device)
    places = [
        torch.where(column == old & 3, first, torch.where(column == old >> 2, second, zero))
        for column in (new & 3, new >> 2)
    ]
    masks = torch.ones_like(new) << (new & 3) | torch.ones_like(new) << (new >> 2)
    masks = torch.nn.functional.pad(masks, (0, masks.shape[1] % 2))
    bitmask = masks[:, ::2] | masks[:, 1::2] << 4
    return packed._replace(values=torch.stack(places, dim=-1).view(rows, cols // 2), bitmask=bitmask)


def values_and_words(packed: Packed) -> tuple[Tensor, Tensor]:
    """Values [rows, cols / 2] and metadata int16 [rows, cols / 16] in plain order, by torch's rule for empty places."""
    rows, cols = packed.shape
    ordered = torch_ordered(packed)
    pairs = torch.tensor(PAIR_OF_MASK, dtype=torch.int32, device=ordered.values.device)
    nibbles = pairs[_nibbles(ordered.bitmask, cols).int()].view(rows, cols // 16, 4)
    words = nibbles[..., 0] | nibbles[..., 1] << 4 | nibbles[..., 2] << 8 | nibbles[..., 3] << 12
    return ordered.values, words.to(torch.int16)


def _nibbles(bitmask: Tensor, cols: int) -> Tensor:
    """The mask of each group of four columns, uint8 [rows, cols / 4]."""
    return torch.stack([bitmask & 15, bitmask >> 4], dim=-1).flatten(1)[:, : cols // 4]


def tiled(words: Tensor) -> Tensor:
    """[cols / 32, rows / 32, 64]: plain words [rows, cols / 16] in tiles, column of tiles after column."""
    rows, columns = words.shape
    tile_i, a, b, c, tile_j, w = range(6)
    parts = words.view(rows // 32, 2, 2, 8, columns // 2, 2)
    return parts.permute(tile_j, tile_i, c, a, w, b).reshape(columns // 2, rows // 32, 64)


def _pair(first: int, second: int) -> int:
    return first | second << 2


def _pair_of_mask(mask: int) -> int:
    columns = [column for column in range(4) if mask >> column & 1]
    return _pair(columns[0], columns[1]) if len(columns) == 2 else 0


def _torch_pair(nonzero: int) -> int:
    """The non-zeros; where two are lacking or one, torch takes {}, {2}, {3} -> (2, 3), {1} -> (1, 2), {0} -> (0, 2)."""
    return {
        0b0000: _pair(2, 3),
        0b0100: _pair(2, 3),
        0b1000: _pair(2, 3),
        0b0010: _pair(1, 2),
        0b0001: _pair(0, 2),
    }.get(nonzero, _pair_of_mask(nonzero))


PAIR_OF_MASK = [_pair_of_mask(mask) for mask in range(16)]
TORCH_PAIR = [_torch_pair(nonzero) for nonzero in range(16)]
