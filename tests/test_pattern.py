"""SparsityPattern: parsing, counts, and the place of the first violation, against loops over single weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wandapp import SparsityPattern, WandappError


@pytest.mark.parametrize(
    ("text", "n", "m", "sparsity", "name"),
    [
        ("2:4", 2, 4, 0.5, "2:4"),
        ("1:4", 1, 4, 0.75, "1:4"),
        (" 4 : 8 ", 4, 8, 0.5, "4:8"),
        ("0.5", None, None, 0.5, "0.5"),
        (0.7, None, None, 0.7, "0.7"),
        ("50%", None, None, 0.5, "0.5"),
    ],
)
def test_parse(text, n, m, sparsity, name):
    pattern = SparsityPattern.parse(text)
    assert (pattern.n, pattern.m, pattern.sparsity, str(pattern)) == (n, m, sparsity, name)
    assert pattern.is_structured == (m is not None)
    assert SparsityPattern.parse(str(pattern)) == pattern == SparsityPattern.parse(pattern)


@pytest.mark.parametrize(
    "text",
    ["1.5", 1.5, "3:2", "0:4", "4:4", "abc", "", "0", "1", "-0.5", "nan", "inf", "2:4:8", "-1:4", "150%", None, True],
)
def test_what_is_no_pattern_is_refused_in_one_sentence(text):
    with pytest.raises(WandappError) as caught:
        SparsityPattern.parse(text)
    message = str(caught.value)
    assert "2:4" in message and "0.5" in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "in_features", "keep"),
    [
        ("2:4", 4096, 2048),
        ("1:4", 12, 3),
        ("2:3", 9, 6),
        ("0.5", 7, 4),
        ("0.5", 4096, 2048),
        ("0.7", 10, 3),
        ("0.99", 1, 1),
    ],
)
def test_keep_is_in_features_minus_the_truncated_number_of_zeros(text, in_features, keep):
    assert SparsityPattern.parse(text).keep(in_features) == keep


def test_require_fit_names_the_linear_and_the_way_out():
    pattern = SparsityPattern.parse("2:4")
    pattern.require_fit("model.layers.3.mlp.up_proj", 4096)
    with pytest.raises(WandappError, match=r"model\.layers\.3\.mlp\.up_proj: 2:4 .* by 4, got 4097; .*--skip up_proj"):
        pattern.require_fit("model.layers.3.mlp.up_proj", 4097)


def first_excess_by_loops(weight, n, m):
    for row in range(len(weight)):
        for column in range(0, len(weight[0]), m):
            if sum(value != 0 for value in weight[row][column : column + m]) > n:
                return row, column
    return None


@given(st.data())
def test_first_violation_of_nm_equals_loops(data):
    m = data.draw(st.integers(2, 5))
    n = data.draw(st.integers(1, m - 1))
    values = st.sampled_from([0.0, -0.0, 1.0, -2.0, float("nan"), float("inf"), 1e-45])
    row = st.lists(values, min_size=2 * m, max_size=2 * m)
    weight = data.draw(st.lists(row, min_size=1, max_size=4))
    pattern = SparsityPattern.parse(f"{n}:{m}")
    expected = first_excess_by_loops(weight, n, m)
    assert pattern.first_violation(torch.tensor(weight)) == expected
    assert pattern.holds(torch.tensor(weight)) == (expected is None)


def test_unstructured_counts_zeros_per_row_or_over_the_matrix():
    pattern = SparsityPattern.parse(0.5)
    uneven = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 2.0, 3.0]])
    assert pattern.first_violation(uneven) == (1, 3)  # the third non-zero of row 1; two are allowed
    assert pattern.holds(uneven, group="matrix")
    assert pattern.first_violation(torch.ones(2, 4), group="matrix") == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_violation_is_found_in_every_dtype_and_along_strides(dtype):
    weight = torch.zeros(8, 5, dtype=dtype).T  # [5, 8], column stride 5
    weight[3, 4:7] = 1
    assert SparsityPattern.parse("2:4").first_violation(weight) == (3, 4)
    assert SparsityPattern.parse("3:4").holds(weight)


def test_empty_weight_holds_any_pattern():
    assert SparsityPattern.parse("2:4").holds(torch.empty(0, 4))
    assert SparsityPattern.parse("0.5").holds(torch.empty(3, 0))
