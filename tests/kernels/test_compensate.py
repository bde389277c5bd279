import math

import pytest
import torch

from wandapp.errors import NonFiniteScoreError, WandappError
from wandapp.kernels.compensate import compensate_block_


def factor_of(width):
    """Upper Cholesky factor of an inverse Hessian."""
    x = torch.randn(3 * width + 8, width)
    inverse = torch.linalg.inv(x.T @ x / len(x) + 0.1 * torch.eye(width))
    return torch.linalg.cholesky(inverse, upper=True)


def oracle(weight, factor, n, m, mask):
    """The equations in fp64 with loops. Returns pruned weight, mask, error."""
    rows, width = weight.shape
    w, u = weight.double().tolist(), factor.double().tolist()
    keep = mask.tolist() if mask is not None else [[False] * width for _ in range(rows)]
    error = [[0.0] * width for _ in range(rows)]
    for row in range(rows):
        for c in range(width):
            if mask is None and c % m == 0:
                order = sorted(range(c, c + m), key=lambda j: (-(w[row][j] ** 2) / u[j][j] ** 2, j))
                for j in order[:n]:
                    keep[row][j] = True
            kept = w[row][c] if keep[row][c] else 0.0
            e = error[row][c] = (w[row][c] - kept) / u[c][c]
            for j in range(c + 1, width):
                w[row][j] -= e * u[c][j]
            w[row][c] = kept
    return (
        torch.tensor(w).view(rows, width),
        torch.tensor(keep).view(rows, width),
        torch.tensor(error).view(rows, width),
    )


CASES = [(1, 8, 2, 4), (5, 16, 2, 4), (17, 24, 4, 8), (16, 12, 1, 4), (33, 15, 2, 3), (3, 40, 5, 20), (2, 1, 1, 1)]


@pytest.mark.parametrize("rows, width, n, m", CASES)
def test_nm_equals_the_equations(rows, width, n, m, backend):
    weight, factor = torch.randn(rows, width), factor_of(width)
    pruned = weight.clone()
    result = compensate_block_(pruned, factor, n=n, m=m, backend=backend)
    expected, mask, error = oracle(weight, factor, n, m, None)
    assert torch.equal(result.mask, mask)
    assert (mask.view(rows, -1, m).sum(-1) == n).all()
    torch.testing.assert_close(pruned.double(), expected.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.error.double(), error.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, width", [(1, 8), (19, 37), (16, 128), (0, 16), (4, 0)])
def test_given_mask_equals_the_equations(rows, width, backend):
    weight, factor, mask = torch.randn(rows, width + 3)[:, :width], factor_of(width), torch.rand(rows, width) > 0.5
    pruned = torch.randn(rows, width + 3)[:, :width]  # rows further apart than they are long
    pruned.copy_(weight)
    result = compensate_block_(pruned, factor, mask=mask, backend=backend)
    expected, _, error = oracle(weight, factor, None, None, mask)
    assert torch.equal(result.mask, mask)
    assert (pruned[~mask] == 0).all()
    torch.testing.assert_close(pruned.double(), expected.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.error.double(), error.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(n=2, m=4), dict(n=3, m=16), dict(mask=None)], ids=["2:4", "3:16", "mask"])
def test_every_instruction_set_gives_the_reference_bits(options, backend, bits):
    weight, factor = torch.randn(37, 128), factor_of(128)
    if "mask" in options:
        options = dict(mask=torch.rand(37, 128) > 0.5)
    ours, theirs = weight.clone(), weight.clone()
    result = compensate_block_(ours, factor, **options, backend=backend)
    expected = compensate_block_(theirs, factor, **options, backend="reference")
    assert torch.equal(bits(ours), bits(theirs))
    assert torch.equal(bits(result.error), bits(expected.error))
    assert torch.equal(result.mask, expected.mask)


def test_hand_computed_two_columns(backend):
    weight = torch.tensor([[1.0, 3.0], [4.0, 1.0]])
    factor = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    result = compensate_block_(weight, factor, n=1, m=2, backend=backend)
    # row 0: scores 1/4 and 9 -> column 0 goes, e = 1/2, column 1 becomes 3 - 1/2; row 1: scores 4 and 1 -> column 1 goes
    assert weight.tolist() == [[0.0, 2.5], [4.0, 0.0]]
    assert result.error.tolist() == [[0.5, 0.0], [0.0, 1.0]]
    assert result.mask.tolist() == [[False, True], [True, False]]


def test_identity_factor_only_prunes(backend):
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.5, 0.0, 0.0, 0.25]])
    compensate_block_(weight, torch.eye(8), n=2, m=4, backend=backend)
    assert weight.tolist() == [[1.0, -1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.25]]  # ties keep the lower column


def test_nonfinite_error_names_the_place(backend):
    weight = torch.randn(20, 8)
    weight[18, 5] = math.nan
    with pytest.raises(NonFiniteScoreError, match="row 18, column"):
        compensate_block_(weight, factor_of(8), n=2, m=4, backend=backend)


def test_rejects_what_does_not_fit():
    weight, factor = torch.randn(2, 8), torch.eye(8)
    with pytest.raises(WandappError, match="exactly one of n:m and mask"):
        compensate_block_(weight, factor)
    with pytest.raises(WandappError, match="n and m go together"):
        compensate_block_(weight, factor, n=2)
    with pytest.raises(WandappError, match=r"factor must be float32 \[8, 8\]"):
        compensate_block_(weight, torch.eye(7), n=2, m=4)
    with pytest.raises(WandappError, match="mask must be bool"):
        compensate_block_(weight, factor, mask=torch.ones(2, 8))
    with pytest.raises(WandappError, match="must be float32"):
        compensate_block_(weight.half(), factor, n=2, m=4)
