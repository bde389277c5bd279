"""pairwise_max_sum against its equation in float64, and the assignment solver against all assignments."""

import itertools

import pytest
import torch

from wandapp.channel_order import assignment
from wandapp.errors import WandappError
from wandapp.kernels.max_sum import pairwise_max_sum

# fp32 sums of up to 1100 terms of order 1 in chains of at most 70: a few ulp of the largest partial sum.
TOLERANCE = {"rtol": 3e-6, "atol": 3e-5}


@pytest.mark.parametrize("rows, other_rows, depth", [(1, 1, 1), (3, 5, 16), (5, 2, 37), (66, 130, 1100)])
def test_equals_the_equation(backend, rows, other_rows, depth):
    left, right = torch.randn(rows, depth), torch.randn(other_rows, depth)
    out = pairwise_max_sum(left, right, backend=backend)
    expected = torch.maximum(left.double()[:, None], right.double()[None]).sum(dim=2)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)


def test_strided_and_empty(backend):
    wide = torch.randn(6, 80)
    assert torch.equal(
        pairwise_max_sum(wide[:, :40], wide[:3, 40:], backend=backend),
        pairwise_max_sum(wide[:, :40].clone(), wide[:3, 40:].clone(), backend=backend),
    )
    assert pairwise_max_sum(wide[:0], wide, backend=backend).shape == (0, 6)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b: (a.half(), b), "left must be float32"),
        (lambda a, b: (a, b[:, :3]), r"right must be float32 \[4, 5\]"),
        (lambda a, b: (a[:, :0], b[:, :0]), "must have columns"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(WandappError, match=message):
        pairwise_max_sum(*change(torch.ones(2, 5), torch.ones(4, 5)))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["random", "ties", "one best column", "negative"])
def test_assignment_is_the_best_of_all(size, kind):
    gain = torch.randn(size, size)
    if kind == "ties":
        gain = gain.round()
    if kind == "one best column":
        gain[:, 0] += 10.0
    if kind == "negative":
        gain = -gain.abs() * 1e6
    taken = assignment(gain).tolist()
    assert sorted(taken) == list(range(size))
    values = [sum(gain[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(size))]
    assert sum(gain[i, j].item() for i, j in enumerate(taken)) == pytest.approx(max(values), rel=1e-6, abs=1e-6)


def test_assignment_of_many_meets_its_bound():
    """Prices that no pair undercuts bound every assignment; here they are known: gain = a_i + b_j - |i - p_j|, best at p."""
    size = 200
    place = torch.randperm(size)
    distance = (torch.arange(size)[:, None] - place[None]).abs()
    gain = torch.randn(size, 1) + torch.randn(1, size) - distance
    assert torch.equal(place[assignment(gain)], torch.arange(size))


def test_assignment_of_what_is_no_number_is_refused():
    with pytest.raises(WandappError, match="not finite"):
        assignment(torch.full((3, 3), torch.nan))
