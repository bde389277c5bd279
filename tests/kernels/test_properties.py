"""Any pattern, shape, stride, type and contents: masks, packed forms, products and layouts by the rules in words.

The oracles sort Python lists; contents mix random numbers with ties, both zeros, denormals and large numbers.
"""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from wandapp import _C
from wandapp.errors import NonFiniteScoreError
from wandapp.kernels.pack import pack, unpack
from wandapp.kernels.pack.int8 import to_int8
from wandapp.kernels.select import prune_nm_, prune_pack_nm_, prune_rows_, select_nm, select_rows
from wandapp.kernels.semi_structured import cutlass_layout
from wandapp.kernels.sparse_linear import sparse_linear

ISAS = [isa for isa in ("portable", "avx2", "avx512", "avx512vbmi2") if _C.isa_runs_here(isa)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def weights(draw, least=0):
    """(weight, m): a view with a wider row stride, at least `least` rows and groups of m columns."""
    dtype, rows, m = draw(st.sampled_from(DTYPES)), draw(st.integers(least, 6)), draw(st.integers(1, 40))
    cols = draw(st.integers(least, 40)) * m
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, cols + draw(st.integers(0, 3)), generator=generator).to(dtype)
    kinds = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, 0.5, -0.5, kinds.smallest_normal / 4, kinds.smallest_normal, kinds.max / 2]).to(
        dtype
    )
    chosen = special[torch.randint(len(special), weight.shape, generator=generator)]
    take = torch.rand(weight.shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return torch.where(take, chosen, weight)[:, :cols], m


def largest(scores, count):
    """Places of the `count` largest: larger first, then the lower place."""
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


def kept_places(weight, scale, m, n):
    """For each row the columns kept, with scores formed in fp32."""
    scores = numpy.abs(weight.float().numpy()) * scale.numpy()
    cols = weight.shape[1]
    return [
        [first + place for first in range(0, cols, m) for place in largest(row[first : first + m].tolist(), n)]
        for row in scores
    ]


def mask_of(places, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, columns in enumerate(places):
        mask[row, columns] = True
    return mask


def bytes_of(mask):
    return [[sum(int(bit) << i for i, bit in enumerate(row[c : c + 8])) for c in range(0, len(row), 8)] for row in mask]


def as_bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@settings(max_examples=25, deadline=None)
@given(weights(), st.data())
def test_choice_zeros_and_packed_form_follow_the_rule(case, data):
    weight, m = case
    cols = weight.shape[1]
    by_rows = data.draw(st.booleans())
    n = data.draw(st.integers(0, cols)) if by_rows else data.draw(st.integers(1, m))
    scale = torch.tensor([0.0, 0.25, 1.0, 1.5])[torch.randint(4, (cols,), generator=torch.Generator().manual_seed(n))]
    places = kept_places(weight, scale, max(cols, 1) if by_rows else m, n)
    mask = mask_of(places, weight.shape)
    zeroed = torch.where(mask & (weight != 0), weight, torch.zeros_like(weight))
    options = {"keep": n} if by_rows else {"n": n, "m": m}
    select, prune = (select_rows, prune_rows_) if by_rows else (select_nm, prune_nm_)
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDAPP_ISA", isa)
            pruned, fused = weight.clone(), weight.clone()
            assert torch.equal(select(weight, scale, **options), mask), isa
            assert prune(pruned, scale, **options).tolist() == bytes_of(mask.tolist()), isa
            assert torch.equal(as_bits(pruned), as_bits(zeroed)), isa
            if not by_rows:
                packed = prune_pack_nm_(fused, scale, **options)
                assert torch.equal(as_bits(fused), as_bits(zeroed)), isa
                assert torch.equal(as_bits(packed.values), as_bits(zeroed[mask].view(len(weight), cols // m * n))), isa
                assert packed.bitmask.tolist() == bytes_of(mask.tolist()), isa


@settings(max_examples=25, deadline=None)
@given(weights(least=1), st.sampled_from([float("nan"), float("inf")]), st.data())
def test_any_nonfinite_weight_is_named(case, value, data):
    weight, m = case
    rows, cols = weight.shape
    found = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, cols - 1)), min_size=1, max_size=3))
    for row, column in found:
        weight[row, column] = value
    for isa in ISAS:
        for call in (lambda w: select_nm(w, n=1, m=m), lambda w: prune_rows_(w, keep=cols // 2)):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(NonFiniteScoreError) as caught:
                patch.setenv("WANDAPP_ISA", isa)
                call(weight.clone())
            assert (caught.value.row, caught.value.column) == min(found), isa


@settings(max_examples=25, deadline=None)
@given(weights(), st.data())
def test_packed_forms_come_back_and_multiply(case, data):
    """n:m with 0 to n non-zeros a group, or row offsets; in the weight's type and in int8; 1 to 18 tokens."""
    weight, m = case
    n = data.draw(st.none() | st.integers(1, m))
    weight = torch.where(weight.abs() > 1e4, weight.sign(), weight)  # sums of large numbers overflow
    if n is not None:
        weight = torch.where(mask_of(kept_places(weight, torch.ones(weight.shape[1]), m, n), weight.shape), weight, 0)
    clean = weight + torch.zeros_like(weight)
    x = torch.randn(data.draw(st.sampled_from([1, 2, 5, 8, 16, 18])), weight.shape[1]).to(weight.dtype)
    for isa in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDAPP_ISA", isa)
            packed = pack(weight, n=n, m=None if n is None else m)
            assert torch.equal(as_bits(unpack(packed)), as_bits(clean)), isa
            check_product(sparse_linear(x, packed), x, clean, isa)
            rounded = to_int8(packed)
            check_product(sparse_linear(x, rounded), x, unpack(rounded), isa)


def check_product(y, x, weight, isa):
    """fp32 sums and one rounding to the type; many tokens round the int8 weight to it as well."""
    expected, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    tolerance = 2 * torch.finfo(x.dtype).eps * size + 1e-5 * size + torch.finfo(x.dtype).smallest_normal
    assert ((y.double() - expected).abs() <= tolerance).all(), isa


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(DTYPES[1:]), st.integers(0, 2**32))
def test_cutlass_layout_is_torchs_own(row_tiles, column_tiles, dtype, seed):
    """Groups of 0 to 2 non-zeros, -0.0 and denormals among them, on shapes of 32 x 64 tiles."""
    generator = torch.Generator().manual_seed(seed)
    shape = (32 * row_tiles, 64 * column_tiles)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < 0.1] = torch.finfo(dtype).smallest_normal / 4
    order = torch.rand(shape[0], shape[1] // 4, 4, generator=generator).argsort(-1)
    count = torch.randint(0, 3, (shape[0], shape[1] // 4, 1), generator=generator)
    weight = torch.where((order < count).view(shape), weight, torch.zeros_like(weight))
    expected = sparse_semi_structured_from_dense_cutlass(weight)
    negative = torch.where(weight == 0, -torch.zeros_like(weight), weight)
    for dense in (weight, negative):
        values, metadata = cutlass_layout(pack(dense, n=2, m=4))
        assert torch.equal(as_bits(values), as_bits(expected[0])) and torch.equal(metadata, expected[1])
