"""The oracle is the equation in numpy, every step rounded to fp32, and a stable sort; masks must agree bit for bit."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp.errors import NonFiniteScoreError, WandappError
from wandapp.kernels.bitmask import pack_bits, unpack_bits
from wandapp.kernels.pack import pack
from wandapp.kernels.select import prune_nm_, prune_pack_nm_, prune_rows_, select_nm, select_rows

SHAPES = [(0, 16), (7, 0), (1, 1), (4, 37), (3, 48), (2, 4097), (33, 64)]


def oracle_mask(weight, column_scale, gradient, alpha, n, m):
    """n of every m by the equation, for m that divides the columns. Rows: m = columns."""
    w = numpy.abs(weight.float().numpy())
    factor = numpy.ones(w.shape[1], numpy.float32) if column_scale is None else column_scale.numpy()
    if gradient is not None:
        factor = numpy.float32(alpha) * gradient.numpy() + factor
    groups = (w * factor).reshape(w.shape[0], -1 if w.size else w.shape[1] // m, m)
    order = numpy.argsort(-groups, axis=-1, kind="stable")  # equal scores stay in column order
    mask = numpy.zeros(groups.shape, bool)
    numpy.put_along_axis(mask, order[..., :n], True, axis=-1)
    return torch.from_numpy(mask.reshape(w.shape))


def awkward_weight(rows, cols, dtype):
    """Random, with ties, both zeros, denormals and extremes; a view whose row stride exceeds its columns."""
    weight = torch.randn(rows, cols + 5).to(dtype)
    weight[:, ::3] = 0.5
    weight[:, 1::5] = -0.0
    weight[:, 2::7] = 0.0
    weight[:, 3::11] = torch.finfo(dtype).smallest_normal / 4
    weight[:, 4::13] = torch.finfo(dtype).max / 16
    return weight[:, 2 : cols + 2]


def terms(rows, cols, which):
    column_scale = torch.rand(cols) if "scale" in which else None
    gradient = torch.rand(rows, cols) if "gradient" in which else None
    return column_scale, gradient


def check_pruned(before, after, mask, bitmask, bits):
    assert torch.equal(bitmask, pack_bits(mask))
    assert torch.equal(unpack_bits(bitmask, before.shape[1]), mask)
    expected = torch.where(mask & (before != 0), before, torch.zeros_like(before))
    assert torch.equal(bits(after), bits(expected))


@pytest.mark.parametrize("which", ["", "scale+gradient"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_the_equation(shape, which, dtype, backend, bits):
    weight, (column_scale, gradient) = awkward_weight(*shape, dtype), terms(*shape, which)
    cols = shape[1]
    for keep in {0, min(1, cols), cols // 2, cols}:
        mask = oracle_mask(weight, column_scale, gradient, 2.5, keep, max(cols, 1))
        options = dict(keep=keep, alpha=2.5, backend=backend)
        assert torch.equal(select_rows(weight, column_scale, gradient, **options), mask)
        pruned = weight.clone()
        check_pruned(weight, pruned, mask, prune_rows_(pruned, column_scale, gradient, **options), bits)


@pytest.mark.parametrize("which", ["", "scale+gradient"])
@pytest.mark.parametrize(
    "n, m", [(1, 2), (2, 4), (1, 4), (4, 8), (6, 8), (8, 16), (16, 16), (3, 5), (1, 1), (16, 32), (20, 48)]
)
def test_nm_equals_the_equation(n, m, which, dtype, backend, bits):
    for rows, groups in ((0, 1), (3, 0), (5, 7)):
        weight, (column_scale, gradient) = awkward_weight(rows, groups * m, dtype), terms(rows, groups * m, which)
        mask = oracle_mask(weight, column_scale, gradient, 2.5, n, m)
        options = dict(n=n, m=m, alpha=2.5, backend=backend)
        assert torch.equal(select_nm(weight, column_scale, gradient, **options), mask)
        pruned = weight.clone()
        check_pruned(weight, pruned, mask, prune_nm_(pruned, column_scale, gradient, **options), bits)


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (1, 4), (4, 8), (8, 16), (3, 5), (1, 1), (20, 48)])
def test_pruning_packs_in_the_same_pass(n, m, dtype, backend, bits):
    """Bit-equal to prune_nm_ and pack, also where scores of non-zero weights are zero and ties decide."""
    for rows, groups, which in ((0, 1, ""), (3, 0, ""), (5, 7, "scale+gradient"), (2, 33, "scale")):
        weight, (column_scale, gradient) = awkward_weight(rows, groups * m, dtype), terms(rows, groups * m, which)
        if column_scale is not None:
            column_scale[::3] = 0
        options = dict(n=n, m=m, alpha=0.0, backend=backend)
        fused, apart = weight.clone(), weight.clone()
        packed = prune_pack_nm_(fused, column_scale, gradient, **options)
        bitmask = prune_nm_(apart, column_scale, gradient, **options)
        expected = pack(apart, n=n, m=m, backend="reference")
        assert torch.equal(bits(fused), bits(apart))
        assert packed.values.shape == (rows, groups * n) and torch.equal(bits(packed.values), bits(expected.values))
        assert torch.equal(packed.bitmask, bitmask) and torch.equal(packed.bitmask, expected.bitmask)
        assert packed.shape == weight.shape and packed.pattern == (n, m) and packed.row_offsets is None


def test_nonfinite_score_in_a_later_task_of_a_wide_row_is_named(backend):
    weight = torch.ones(1, 150_000)
    weight[0, 140_001] = float("nan")
    for n, m in ((2, 4), (2, 3)):
        with pytest.raises(NonFiniteScoreError, match="row 0, column 140001"):
            select_nm(weight, n=n, m=m, backend=backend)


def test_wide_rows_are_packed_by_several_tasks(backend):
    weight = torch.randn(2, 150_000)
    for n, m in ((2, 4), (2, 3)):
        fused = weight.clone()
        packed = prune_pack_nm_(fused, n=n, m=m, backend=backend)
        mask = oracle_mask(weight, None, None, 0, n, m)
        assert torch.equal(packed.values, weight[mask].view(2, -1)) and torch.equal(packed.bitmask, pack_bits(mask))
        assert torch.equal(fused, weight * mask)


def test_hand_computed_4x8(backend):
    weight = torch.tensor(
        [
            [1.0, -2.0, 3.0, -4.0, 0.0, 0.0, 0.0, 0.0],
            [5.0, 5.0, 5.0, 5.0, -1.0, 1.0, -1.0, 2.0],
            [0.1, 0.2, -0.0, 0.0, 9.0, -8.0, 7.0, -6.0],
            [-1.0, 0.0, 0.0, 1.0, 0.0, 3.0, 0.0, 0.0],
        ]
    )
    expected = [[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 0, 0]]
    assert select_nm(weight, n=2, m=4, backend=backend).int().tolist() == expected
    assert prune_nm_(weight, n=2, m=4, backend=backend).flatten().tolist() == [
        0b00111100,
        0b10010011,
        0b110011,
        0b111001,
    ]
    assert weight[0].tolist() == [0, 0, 3, -4, 0, 0, 0, 0]
    assert weight[1].tolist() == [5, 5, 0, 0, -1, 0, 0, 2]


def test_tie_keeps_lower_column(backend):
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0] * 8])
    assert select_nm(weight, n=1, m=4, backend=backend)[0].nonzero().flatten().tolist() == list(range(0, 32, 4))
    assert select_rows(weight, keep=5, backend=backend)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_score_adds_before_it_multiplies_and_rounds_twice(backend):
    # 1 + 2^-24 rounds to 1: with a fused multiply-add the first weight would win, rounded separately they tie
    gradient = torch.tensor([[1.0 + 2**-23, 1.0]])
    scale = torch.tensor([1.0, 1.0 + 2**-23])
    weight = torch.tensor([[1.0, 1.0]])
    mask = select_nm(weight, scale, gradient, n=1, m=2, alpha=0.5, backend=backend)
    assert torch.equal(mask, oracle_mask(weight, scale, gradient, 0.5, 1, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("select", [select_nm, select_rows, prune_nm_, prune_rows_, prune_pack_nm_])
def test_nonfinite_score_names_the_first_place(select, value, dtype, backend):
    weight = torch.randn(40, 200).to(dtype)
    weight[31, 7] = value
    weight[17, 133] = value
    weight[17, 134] = value
    pattern = dict(n=2, m=4) if "nm" in select.__name__ else dict(keep=100)
    with pytest.raises(NonFiniteScoreError) as caught:
        select(weight, backend=backend, **pattern)
    assert (caught.value.row, caught.value.column) == (17, 133)


def test_overflowing_score_is_an_error(backend):
    with pytest.raises(NonFiniteScoreError, match="row 0, column 1"):
        select_nm(torch.full((1, 4), 3e38), torch.tensor([1.0, 2.0, 1.0, 1.0]), n=2, m=4, backend=backend)


def test_denormal_scores_are_ordered_under_flush_to_zero(backend):
    weight = torch.tensor([[1e-44, 3e-44, 2e-44, 4e-44] * 8])
    torch.set_flush_denormal(True)
    try:
        if backend == "cpu":  # the reference is torch itself, which obeys the mode
            assert select_nm(weight, n=2, m=4, backend=backend)[0, :4].tolist() == [False, True, False, True]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
def test_very_wide_rows(kind, backend, bits):
    cols = 140_001
    weight = torch.randn(2, cols)
    if kind == "ties":
        weight = weight.mul(4).round().div(4)
    if kind == "zeros":
        weight[:, 1000:] = 0
    for keep in (1, cols // 3):
        order = weight.abs().sort(dim=1, descending=True, stable=True).indices
        mask = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order[:, :keep], True)
        assert torch.equal(select_rows(weight, keep=keep, backend=backend), mask)
        pruned = weight.clone()
        check_pruned(weight, pruned, mask, prune_rows_(pruned, keep=keep, backend=backend), bits)


def test_very_wide_row_names_the_first_nonfinite_score(backend):
    weight = torch.randn(1, 150_000)
    weight[0, 140_000] = weight[0, 90_001] = float("nan")
    with pytest.raises(NonFiniteScoreError, match="row 0, column 90001"):
        select_rows(weight, keep=10, backend=backend)


def test_wide_rows_of_groups_split_between_threads(backend):
    weight = torch.randn(1, 150_000)
    for n, m in ((2, 4), (2, 3)):
        assert torch.equal(select_nm(weight, n=n, m=m, backend=backend), oracle_mask(weight, None, None, 0, n, m))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_exactly_n_and_scale_invariant(data):
    m = data.draw(st.sampled_from([2, 3, 4, 8, 16, 24]))
    n = data.draw(st.integers(1, m))
    values = st.floats(-100, 100, width=16)
    row = data.draw(st.lists(values, min_size=m, max_size=4 * m).map(lambda row: row[: len(row) // m * m]))
    weight = torch.tensor([row])
    mask = select_nm(weight, n=n, m=m)
    assert (mask.view(-1, m).sum(1) == n).all()
    assert torch.equal(mask, select_nm(weight * 4, n=n, m=m))
    assert torch.equal(mask, oracle_mask(weight, None, None, 0, n, m))
    keep = data.draw(st.integers(0, len(row)))
    assert select_rows(weight, keep=keep).sum() == keep


def test_column_major_weight_is_selected_but_not_pruned():
    weight = torch.randn(8, 16).T
    assert torch.equal(select_nm(weight, n=2, m=4), select_nm(weight.contiguous(), n=2, m=4))
    with pytest.raises(WandappError, match="unit column stride"):
        prune_nm_(weight, n=2, m=4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: select_nm(w, n=2, m=5), "columns divisible by 5, got 16"),
        (lambda w: select_nm(w, n=5, m=4), "0 < n <= m, got 5:4"),
        (lambda w: select_nm(w, n=0, m=4), "0 < n <= m, got 0:4"),
        (lambda w: select_rows(w, keep=17), "0..16"),
        (lambda w: select_rows(w.view(-1), keep=1), "must be a matrix"),
        (lambda w: select_rows(w.double(), keep=1), "must be float32, bfloat16, float16"),
        (lambda w: select_nm(w, torch.ones(15), n=2, m=4), r"column_scale must be float32 \[16\]"),
        (lambda w: select_nm(w, None, torch.ones(4, 16).half(), n=2, m=4), r"gradient must be float32 \[4, 16\]"),
    ],
)
def test_rejects_what_does_not_fit(call, message):
    with pytest.raises(WandappError, match=message):
        call(torch.randn(4, 16))
