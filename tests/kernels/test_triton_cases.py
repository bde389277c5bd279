"""Every Triton kernel against `reference`: on a GPU where there is one, else in the interpreter (its own process).

A program takes the interpreter some 20 ms, so the shapes are the smallest that have several tiles and a tail in both
directions. Each pattern meets each dtype; pairs that share their tile and their code with another one are marked slow.
"""

import os

import pytest
import torch

from wandapp.errors import BackendUnavailableError, NonFiniteScoreError, TooManyNonZerosError
from wandapp.kernels.column_sumsq import column_sumsq
from wandapp.kernels.compensate import compensate_block_
from wandapp.kernels.max_sum import pairwise_max_sum
from wandapp.kernels.pack import Packed, pack, unpack
from wandapp.kernels.rmsprop import rmsprop_
from wandapp.kernels.select import prune_nm_, prune_pack_nm_, prune_rows_, select_nm, select_rows
from wandapp.kernels.sparse_linear import sparse_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU; test_triton_interpreter runs these on the CPU"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [(2, 4), (4, 8), (8, 16), (1, 2), (3, 4), (2, 3), (1, 1)]
SHAPES = [(1, 48), (5, 288)]  # less than one tile; more than one, and a tail
QUICK = {(2, 4): DTYPES, (4, 8): DTYPES[1:2], (8, 16): DTYPES[:1], (1, 2): DTYPES[2:], (3, 4): DTYPES[1:2],
         (2, 3): DTYPES[:1], (1, 1): DTYPES[1:2], (None, None): DTYPES[1:2]}  # fmt: skip


def each_dtype_and(patterns):
    """(dtype, n, m): a few of the pairs always, all of them in the slow run."""
    return [
        pytest.param(dtype, n, m, marks=() if dtype in QUICK[n, m] else pytest.mark.slow, id=f"{dtype}-{n}:{m}")
        for dtype in DTYPES
        for n, m in patterns
    ]


def strided(rows, cols, dtype, seed=0):
    """Weights with ties, -0.0, denormals and a row stride wider than the row."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, cols + 5).to(dtype)
    weight[torch.rand(weight.shape) < 0.2] = 0.5
    weight[torch.rand(weight.shape) < 0.1] = -0.0
    weight[torch.rand(weight.shape) < 0.1] = torch.finfo(dtype).tiny / 4
    return weight[:, :cols]


def terms(rows, cols, which):
    column_scale = torch.rand(cols) + 0.1 if "scale" in which else None
    gradient = torch.rand(rows, cols) if "gradient" in which else None
    return column_scale, gradient


def to_device(*tensors):
    return [None if tensor is None else tensor.clone().to(DEVICE) for tensor in tensors]


def device_strided(weight):
    """A copy on the device that keeps the wider row stride."""
    wide = torch.zeros(weight.shape[0], weight.shape[1] + 5, dtype=weight.dtype, device=DEVICE)
    wide[:, : weight.shape[1]] = weight.to(DEVICE)
    return wide[:, : weight.shape[1]]


def bits_of(tensor):
    return tensor.cpu().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_bit_equal(actual, expected):
    assert actual.shape == expected.shape
    if actual.dtype.is_floating_point:
        actual, expected = bits_of(actual), bits_of(expected)
    assert torch.equal(actual.cpu(), expected.cpu())


def check_selection(select, prune_, weight, column_scale, gradient, **options):
    expected = select(weight, column_scale, gradient, backend="reference", **options)
    terms_on_device = to_device(column_scale, gradient)
    assert_bit_equal(select(device_strided(weight), *terms_on_device, backend="triton", **options), expected)
    pruned, pruned_expected = device_strided(weight), weight.clone()
    bitmask = prune_(pruned, *terms_on_device, backend="triton", **options)
    assert_bit_equal(bitmask, prune_(pruned_expected, column_scale, gradient, backend="reference", **options))
    assert_bit_equal(pruned, pruned_expected)


@pytest.mark.parametrize("dtype, n, m", each_dtype_and(PATTERNS))
def test_nm_choice_is_bit_equal(dtype, n, m):
    which = {(2, 4): "scale gradient", (4, 8): "scale", (3, 4): "gradient"}.get((n, m), "")
    for rows, cols in [*SHAPES, (2, 3 * m)]:  # the last: a byte of the bitmask that is not full
        weight = strided(rows, cols, dtype)
        check_selection(select_nm, prune_nm_, weight, *terms(rows, cols, which), n=n, m=m, alpha=100.1)


@pytest.mark.parametrize("dtype, n, m", each_dtype_and(PATTERNS))
def test_pruning_packs_in_the_same_pass(dtype, n, m):
    """Also where weights that are not zero score zero, and ties decide."""
    for rows, cols in SHAPES:
        weight, (column_scale, _) = strided(rows, cols, dtype), terms(rows, cols, "scale")
        column_scale[::3] = 0
        fused, apart = device_strided(weight), weight.clone()
        packed = prune_pack_nm_(fused, *to_device(column_scale), n=n, m=m, backend="triton")
        bitmask = prune_nm_(apart, column_scale, n=n, m=m, backend="reference")
        assert_bit_equal(fused, apart)
        assert_bit_equal(packed.bitmask, bitmask)
        assert_bit_equal(packed.values, pack(apart, n=n, m=m, backend="reference").values)


def test_nm_group_wider_than_the_network_is_refused():
    with pytest.raises(BackendUnavailableError, match="up to 16"):
        select_nm(torch.ones(1, 64, device=DEVICE), n=16, m=32, backend="triton")


@pytest.mark.parametrize(
    "dtype, which",
    [
        (torch.float32, "scale gradient"),
        (torch.bfloat16, ""),  # the low bits of its keys are not searched
        (torch.float16, "scale"),
        pytest.param(torch.float32, "", marks=pytest.mark.slow),
        pytest.param(torch.float16, "", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "scale gradient", marks=pytest.mark.slow),
        pytest.param(torch.float32, "gradient", marks=pytest.mark.slow),
    ],
)
def test_row_choice_is_bit_equal(dtype, which):
    for rows, cols, keeps in [(3, 7, (0, 3, 7)), (2, 1300, (650,))]:
        weight = strided(rows, cols, dtype)
        for keep in keeps:
            check_selection(select_rows, prune_rows_, weight, *terms(rows, cols, which), keep=keep, alpha=100.1)


@pytest.mark.parametrize("fill", [None, 0.0])
def test_rows_wider_than_one_program_take_the_radix_search(monkeypatch, fill):
    from wandapp.kernels.select import triton_impl

    for name, value in {"WIDEST_ROW": 64, "WIDE_BLOCK": 256, "WIDE_STEPS": 2}.items():
        monkeypatch.setattr(triton_impl, name, value)
    cols = 601  # 3 tiles, 2 counting programs
    weight = strided(2, cols, torch.bfloat16)
    if fill is not None:
        weight = torch.full_like(weight, fill)  # every key is equal: only the columns decide
    for keep in (1, 300) if fill is None else (300, cols):
        check_selection(select_rows, prune_rows_, weight, *terms(2, cols, "scale" if fill is None else ""), keep=keep)


def test_wide_rows_name_the_first_nonfinite_score(monkeypatch):
    from wandapp.kernels.select import triton_impl

    for name, value in {"WIDEST_ROW": 64, "WIDE_BLOCK": 256, "WIDE_STEPS": 1}.items():
        monkeypatch.setattr(triton_impl, name, value)
    weight = torch.ones(2, 600)
    weight[1, 301] = weight[1, 560] = float("nan")
    with pytest.raises(NonFiniteScoreError) as caught:
        select_rows(weight.to(DEVICE), keep=9, backend="triton")
    assert (caught.value.row, caught.value.column) == (1, 301)


def test_nothing_is_written_beyond_the_last_row_of_a_bitmask(monkeypatch):
    """Bytes that belong to no row lie behind it and keep their value."""
    from wandapp.kernels import triton_groups
    from wandapp.kernels.pack import triton_impl as pack_triton
    from wandapp.kernels.select import triton_impl as select_triton

    buffers = []

    def with_guard(weight):
        rows, cols = weight.shape
        buffers.append(torch.full((rows + 1, (cols + 7) // 8), 0xA5, dtype=torch.uint8, device=weight.device))
        return buffers[-1][:rows]

    for module in (triton_groups, pack_triton, select_triton):
        monkeypatch.setattr(module, "empty_bitmask", with_guard)
    weight = torch.randn(3, 36, device=DEVICE)
    for prune in (
        lambda w: prune_rows_(w, keep=9, backend="triton"),
        lambda w: prune_nm_(w, n=2, m=4, backend="triton"),
        lambda w: prune_nm_(w, n=2, m=3, backend="triton"),
        lambda w: pack(w, backend="triton"),
    ):
        prune(weight.clone())
        assert (buffers.pop()[-1] == 0xA5).all()


def test_tie_keeps_lower_column():
    weight = torch.ones(2, 32, device=DEVICE)
    assert (
        select_nm(weight, n=2, m=4, backend="triton")
        .cpu()
        .view(2, 8, 4)
        .equal(torch.tensor([True, True, False, False]).expand(2, 8, 4))
    )
    assert select_rows(weight, keep=5, backend="triton").cpu().equal((torch.arange(32) < 5).expand(2, 32))


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "choose",
    [
        lambda w: select_nm(w, n=2, m=4, backend="triton"),
        lambda w: select_nm(w, n=3, m=7, backend="triton"),
        lambda w: prune_nm_(w, n=8, m=16, backend="triton"),
        lambda w: prune_rows_(w, keep=5, backend="triton"),
    ],
    ids=["2:4", "3:7", "8:16", "rows"],
)
def test_first_nonfinite_score_is_named(choose, value):
    """Tiles run in any order, and a tile may hold several."""
    weight = torch.ones(7, 336)
    weight[5, 301] = weight[5, 17] = weight[5, 19] = weight[6, 0] = value
    with pytest.raises(NonFiniteScoreError) as caught:
        choose(weight.to(DEVICE))
    assert (caught.value.row, caught.value.column) == (5, 17)


def test_a_nonfinite_score_is_reported_by_its_own_call_only(monkeypatch):
    from wandapp.kernels import triton_groups

    monkeypatch.setattr(triton_groups, "CELLS", 2)
    monkeypatch.setattr(triton_groups, "_cells", {})
    good = torch.ones(2, 16, device=DEVICE)
    bad = torch.full_like(good, float("inf"))
    for _ in range(3):  # beyond the cells of one fill
        with pytest.raises(NonFiniteScoreError):
            select_nm(bad, n=2, m=4, backend="triton")
        assert select_nm(good, n=2, m=4, backend="triton").sum() == 16


def sparse_weight(rows, cols, dtype, n, m):
    """0 to n non-zeros in every group, some of the zeros negative; unstructured when n is None."""
    weight = strided(rows, cols, dtype).clone()
    if n is None:
        return weight * (torch.rand(rows, cols) < 0.5)
    groups = weight.view(rows, cols // m, m)
    order = torch.rand(groups.shape).argsort(-1).argsort(-1)
    groups[order >= torch.randint(0, n + 1, (rows, cols // m, 1))] = 0.0
    groups[(order == m - 1) & (groups == 0)] = -0.0
    return weight


@pytest.mark.parametrize("dtype, n, m", each_dtype_and([*PATTERNS, (None, None)]))
def test_packed_form_is_bit_equal(dtype, n, m):
    for rows, cols in [*SHAPES, (2, 3 * (m or 4))]:
        weight = sparse_weight(rows, cols, dtype, n, m)
        packed = pack(device_strided(weight), n=n, m=m, backend="triton")
        expected = pack(weight, n=n, m=m, backend="reference")
        assert_bit_equal(packed.values, expected.values)
        assert_bit_equal(packed.bitmask, expected.bitmask)
        if n is None:
            assert_bit_equal(packed.row_offsets, expected.row_offsets)
        assert_bit_equal(unpack(packed, backend="triton"), torch.where(weight == 0, 0.0, weight))


@pytest.mark.parametrize("n, m", [(None, None), (2, 4)])
def test_rows_of_several_blocks_are_packed_and_come_back(monkeypatch, n, m):
    from wandapp.kernels.pack import triton_impl

    monkeypatch.setattr(triton_impl, "BLOCK_COLS", 64)
    weight = sparse_weight(2, 148, torch.bfloat16, n, m)
    packed, expected = (pack(w, n=n, m=m, backend=b) for w, b in ((weight.to(DEVICE), "triton"), (weight, "reference")))
    assert_bit_equal(packed.values, expected.values)
    assert_bit_equal(packed.bitmask, expected.bitmask)
    assert_bit_equal(unpack(packed, backend="triton"), torch.where(weight == 0, 0.0, weight))


def test_first_crowded_group_is_named():
    weight = torch.zeros(20, 560)
    weight[13, 300:303] = weight[13, 520:524] = weight[19, :4] = 1.0
    with pytest.raises(TooManyNonZerosError) as caught:
        pack(weight.to(DEVICE), n=2, m=4, backend="triton")
    assert (caught.value.row, caught.value.column) == (13, 300)


@pytest.mark.parametrize(
    "rows, width, n, m", [(3, 8, 2, 4), (17, 24, 1, 3), (9, 64, 4, 8), (1, 1, 1, 1), (20, 21, None, None)]
)
def test_compensation_is_bit_equal(rows, width, n, m):
    weight = strided(rows, width, torch.float32)
    root = torch.randn(width, width)
    factor = torch.linalg.cholesky(torch.linalg.inv(root @ root.T + torch.eye(width)), upper=True).contiguous()
    mask = torch.rand(rows, width) < 0.5 if n is None else None
    on_device, expected_weight = device_strided(weight), weight.clone()
    expected = compensate_block_(expected_weight, factor, n=n, m=m, mask=mask, backend="reference")
    actual = compensate_block_(
        on_device, factor.to(DEVICE), n=n, m=m, mask=None if mask is None else mask.to(DEVICE), backend="triton"
    )
    assert_bit_equal(actual.mask, expected.mask)
    assert torch.equal(actual.error.cpu(), expected.error)  # 0 may differ in sign
    assert torch.equal(on_device.cpu(), expected_weight)


def test_compensation_names_the_first_nonfinite_error():
    weight = torch.ones(40, 16)
    weight[30, 5] = float("nan")
    with pytest.raises(NonFiniteScoreError) as caught:
        compensate_block_(weight.to(DEVICE), torch.eye(16, device=DEVICE), n=2, m=4, backend="triton")
    assert (caught.value.row, caught.value.column) == (30, 5)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 1, 1), torch.float32),
        ((2, 37, 65), torch.bfloat16),
        ((2, 37, 300), torch.float16),
        ((1, 1100, 40), torch.float32),
        ((2, 0, 5), torch.bfloat16),
        pytest.param((1, 1100, 40), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param((1, 1100, 40), torch.float16, marks=pytest.mark.slow),
        pytest.param((2, 37, 300), torch.float32, marks=pytest.mark.slow),
    ],
)
def test_sum_of_squares(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    actual = column_sumsq(x.to(DEVICE), backend="triton").cpu()
    torch.testing.assert_close(actual, x.double().square().sum(1).float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(actual, column_sumsq(x.to(DEVICE), backend="triton").cpu())  # no atomics: equal bits


PRODUCTS = [(1, 17, 12), (3, 37, 96), (11, 5, 1056), (0, 4, 12), (17, 8, 24)]  # tokens, rows, cols


@pytest.mark.parametrize("dtype, n, m", each_dtype_and([(2, 4), (4, 8), (2, 3), (None, None)]))
@pytest.mark.parametrize("tokens, rows, cols", PRODUCTS)
def test_sparse_linear_matches_the_dense_product(dtype, n, m, tokens, rows, cols):
    check_product(dtype, n, m, tokens, rows, cols + (4 if m == 8 and cols % 8 else 0))


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("dtype, n", [(torch.bfloat16, 2), (torch.float16, None), (torch.float32, 2)])
def test_decode_takes_1_to_16_tokens(dtype, n, tokens):
    """2:4 on the tensor cores, by row offsets, and 2:4 in fp32, which goes the way of the offsets."""
    check_product(dtype, n, n and 4, tokens, 19, 64)


def test_columns_split_over_programs_are_added():
    """As few rows as these leave multiprocessors idle, so programs share them: three splits, the last one short."""
    check_product(torch.bfloat16, 2, 4, 3, 5, 3100)


def check_product(dtype, n, m, tokens, rows, cols):
    weight = sparse_weight(rows, cols, dtype, n, m)
    x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
    packed = pack(weight, n=n, m=m, backend="reference")
    on_device = Packed(*to_device(packed.values, packed.bitmask, packed.row_offsets), packed.shape, packed.pattern)
    expected = x.double() @ weight.double().T + bias.double()
    actual = sparse_linear(x.to(DEVICE), on_device, bias.to(DEVICE), backend="triton").cpu().double()
    # one rounding to dtype of the result, and fp32 sums (the dense path of many tokens may round once more, for bias)
    epsilon = torch.finfo(dtype).eps
    scale = x.double().abs() @ weight.double().abs().T + 1
    assert ((actual - expected).abs() <= 2 * epsilon * expected.abs() + 1e-5 * scale + epsilon * 4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(1,), (3, 700)])
def test_rmsprop_step(shape, dtype):
    torch.manual_seed(0)
    weight, mean_square = torch.randn(shape), torch.rand(shape)
    gradient = torch.randn(shape).to(dtype)
    ours = to_device(weight, mean_square)
    rmsprop_(ours[0], gradient.to(DEVICE), ours[1], lr=0.1, backend="triton")
    v = 0.99 * mean_square.double() + 0.01 * gradient.double() ** 2
    w = weight.double() - 0.1 * gradient.double() / (v.sqrt() + 1e-8)
    torch.testing.assert_close(ours[1].cpu().double(), v, rtol=5e-6, atol=5e-7)
    torch.testing.assert_close(ours[0].cpu().double(), w, rtol=5e-6, atol=5e-7)


@pytest.mark.parametrize("rows, other_rows, depth", [(3, 5, 7), (65, 70, 9)])
def test_pairwise_max_sum(rows, other_rows, depth):
    left, right = torch.randn(rows, depth), torch.randn(other_rows, depth)
    out = pairwise_max_sum(*to_device(left, right), backend="triton").cpu()
    torch.testing.assert_close(out, pairwise_max_sum(left, right, backend="reference"), rtol=1e-6, atol=1e-5)
