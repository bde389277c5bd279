import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp.errors import TooManyNonZerosError, WandappError
from wandapp.kernels.pack import Packed, pack, unpack

PATTERNS = [(1, 2), (2, 4), (1, 4), (4, 8), (8, 16), (3, 5), (1, 1), (24, 32), (7, 40)]
SHAPES = [(0, 16), (7, 0), (1, 1), (4, 37), (3, 48), (2, 4097), (33, 64)]


def oracle_places(row, n, m):
    """Columns a packed row stores, by the rule in words."""
    places = []
    for first in range(0, len(row), m):
        nonzero = [c for c in range(first, first + m) if row[c] != 0]
        zero = [c for c in range(first, first + m) if row[c] == 0]
        places += sorted(nonzero + zero[: n - len(nonzero)])
    return places


def bitmask_of(places, cols):
    row = bytearray((cols + 7) // 8)
    for c in places:
        row[c // 8] |= 1 << c % 8
    return list(row)


def sparse_groups(rows, groups, n, m, dtype):
    """Groups with 0, 1, ..., n non-zeros, some zeros negative, denormals and NaN among the values; a strided view."""
    weight = torch.zeros(rows, groups * m + 3)
    weight[:, ::2] = -0.0
    weight = weight.to(dtype)[:, 1 : groups * m + 1]
    for row in range(rows):
        for group in range(groups):
            count = (row + group) % (n + 1)
            places = group * m + torch.randperm(m)[:count]
            weight[row, places] = torch.randn(count).to(dtype) + 3
    if rows and groups:
        weight[0, torch.nonzero(weight[0])[:1]] = torch.finfo(dtype).smallest_normal / 2
        weight[-1, torch.nonzero(weight[-1])[:1]] = float("nan")
    return weight


@pytest.mark.parametrize("n, m", PATTERNS)
def test_nm_equals_the_rule(n, m, dtype, backend, bits):
    for rows, groups in ((0, 3), (2, 0), (1, 1), (5, 9), (18, 7)):
        weight = sparse_groups(rows, groups, n, m, dtype)
        packed = pack(weight, n=n, m=m, backend=backend)
        assert packed.values.shape == (rows, groups * n) and packed.row_offsets is None and packed.pattern == (n, m)
        positive = torch.where(weight == 0, torch.zeros_like(weight), weight)
        for row in range(rows):
            places = oracle_places(weight[row].tolist(), n, m)
            assert packed.bitmask[row].tolist() == bitmask_of(places, groups * m)
            assert torch.equal(bits(packed.values[row]), bits(positive[row, places]))
        assert torch.equal(bits(unpack(packed, backend=backend)), bits(positive))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_unstructured_equals_the_rule(shape, density, dtype, backend, bits):
    rows, cols = shape
    weight = (torch.randn(rows, cols + 2) * (torch.rand(rows, cols + 2) < density)).to(dtype)[:, 1 : cols + 1]
    packed = pack(weight, backend=backend)
    positive = torch.where(weight == 0, torch.zeros_like(weight), weight)
    assert packed.pattern is None and packed.row_offsets.dtype == torch.int64
    offsets = [0]
    for row in range(rows):
        places = weight[row].float().nonzero().flatten().tolist()
        offsets.append(offsets[-1] + len(places))
        assert packed.bitmask[row].tolist() == bitmask_of(places, cols)
        assert torch.equal(bits(packed.values[offsets[-2] : offsets[-1]]), bits(positive[row, places]))
    assert packed.row_offsets.tolist() == offsets
    assert torch.equal(bits(unpack(packed, backend=backend)), bits(positive))


def test_every_choice_of_eight_columns(dtype, backend, bits):
    """Each of 256 masks in both halves of a chunk of 16, for the tables and compress instructions behind it."""
    places = torch.arange(256)[:, None] >> torch.arange(8) & 1
    weight = torch.arange(1, 49).mul(torch.cat([places, places.flip(0)], 1).repeat(1, 3)).to(dtype)
    packed = pack(weight, backend=backend)
    assert torch.equal(packed.values, weight[weight != 0])
    assert torch.equal(bits(unpack(packed, backend=backend)), bits(weight))


def test_hand_computed_4x8(backend):
    weight = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0],
            [0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0],
            [5.0, 6.0, 0.0, 0.0, 0.0, -0.0, 7.0, 0.0],
            [0.0, 0.0, 8.0, 9.0, -0.0, -0.0, -0.0, -0.0],
        ]
    )
    packed = pack(weight, n=2, m=4, backend=backend)
    assert packed.bitmask.flatten().tolist() == [0b10010011, 0b10010011, 0b01010011, 0b00111100]
    assert packed.values.tolist() == [[0, 0, 1, 2], [0, 3, 0, 4], [5, 6, 0, 7], [8, 9, 0, 0]]
    unstructured = pack(weight, backend=backend)
    assert unstructured.values.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert unstructured.row_offsets.tolist() == [0, 2, 4, 7, 9]


@pytest.mark.parametrize("n, m", [(2, 4), (2, 5), (16, 32)])
def test_crowded_group_is_named(n, m, dtype, backend):
    weight = torch.zeros(40, 6 * m).to(dtype)
    weight[35, : n + 1] = 1
    weight[21, 4 * m : 4 * m + n + 1] = 1
    with pytest.raises(TooManyNonZerosError) as caught:
        pack(weight, n=n, m=m, backend=backend)
    assert (caught.value.row, caught.value.column, caught.value.groups) == (21, 4 * m, 2)
    assert "the first of 2 such groups" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 5), cols=st.integers(0, 70), density=st.floats(0, 1), seed=st.integers(0, 999))
def test_property_unpack_inverts_pack(rows, cols, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * (torch.rand(rows, cols, generator=generator) < density)
    packed = pack(weight)
    assert torch.equal(unpack(packed), weight)
    assert len(packed.values) == weight.count_nonzero()


def test_rejects_what_does_not_fit():
    packed = pack(torch.eye(4), n=2, m=4)
    with pytest.raises(WandappError, match="n and m go together"):
        pack(torch.eye(4), n=2)
    with pytest.raises(WandappError, match="divisible by 4, got 6"):
        pack(torch.zeros(2, 6), n=2, m=4)
    with pytest.raises(WandappError, match=r"bitmask must be uint8 \[4, 1\]"):
        unpack(packed._replace(bitmask=packed.bitmask[:3]))
    with pytest.raises(WandappError, match=r"values must be \[4, 2\]"):
        unpack(packed._replace(values=packed.values[:, :1].contiguous()))
    with pytest.raises(WandappError, match="contiguous"):
        unpack(packed._replace(values=packed.values.T.contiguous().T))
    with pytest.raises(WandappError, match=r"int64 row_offsets \[5\]"):
        unpack(Packed(packed.values, packed.bitmask, None, (4, 4), None))
