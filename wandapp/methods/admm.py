"""ADMM: mask and weights of a linear map together, from the Gram matrix of its inputs (arXiv:2401.02938, arXiv:2406.07831).

    minimise  tr (W' - W) H (W' - W)^T = ||X W'^T - X W^T||^2    over W' that hold the pattern

In scaled coordinates, weights times sqrt(H_jj) and H with ones on its diagonal, a magnitude is Wanda's score. Before that a
millionth of the diagonal's mean is added to H_jj, lest an input that hardly ever differs from zero gets an enormous weight.
Each iteration splits the work between Y, which lowers the error, and Z, which holds the pattern; U adds up what they disagree on:

    Y = W + (Z - U - W) P        P = rho (H + rho I)^-1: the minimiser of the error + rho ||Y - Z + U||^2
    T = a Y + (1 - a) Z + U      a > 1 goes beyond Y (over-relaxation, Boyd et al. 2011, section 3.4.3)
    Z = T where the pattern keeps it, else 0;   U = T - Z

A small rho lets the mask change freely, a large one lets it settle. It grows in a few stages, since each needs a
factorisation. Conjugate gradients then bring the weights to the minimum on the support of the last Z, as in ALPS.
Differs from the papers: rho grows (2401.02938 keeps it, and lets the sparsity grow) by a fixed schedule (ALPS: by a rule).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wandapp.blocks import LinearView
from wandapp.kernels.select import select_nm, select_rows
from wandapp.methods.base import ScoreTerms, as_one_row, scores_of
from wandapp.methods.second_order import SecondOrder
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements

RHO = (0.35, 0.63, 1.12, 2.0)  # of each stage, in units of the scaled H's diagonal
RELAXATION = 1.5
FINISHING_STEPS = 4  # of conjugate gradients
FAINTEST = 1e-6  # of the diagonal's mean, added to it
TINY = 1e-30  # in place of a zero that divides a zero


class ScaledHessian(NamedTuple):
    """scale [in] = sqrt(H_jj), value [in, in] with 1 + damping on its diagonal; first: P of the first stage."""

    scale: Tensor
    value: Tensor
    first: Tensor


class ADMM(SecondOrder[ScaledHessian]):
    """n:m masks are chosen per group, unstructured ones over the whole map: the errors of its rows add up."""

    title = "ADMM"

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        return ScoreTerms(measured.hessians[view.name].value.diagonal().sqrt())

    def factorise(self, hessian: Tensor, damping: float) -> ScaledHessian | None:
        diagonal = hessian.diagonal()
        scale = (diagonal + FAINTEST * diagonal.mean()).sqrt()
        value = hessian / scale / scale[:, None]
        value.diagonal().fill_(1 + damping)
        first = inverse(value, RHO[0])
        return None if first is None else ScaledHessian(scale, value, first)

    def solve_(self, weights: dict[str, Tensor], factor: ScaledHessian, pattern: SparsityPattern) -> None:
        """All maps go through a stage together, so that one factorisation is in memory."""
        splittings = {}
        for name, weight in weights.items():
            with scores_of(name):
                splittings[name] = Splitting(weight.mul_(factor.scale), pattern.at(name))
        for stage, rho in enumerate(RHO):
            product = inverse(factor.value, rho) if stage else factor.first
            assert product is not None  # with the smallest rho it was positive definite
            for splitting in splittings.values():
                splitting.dual.mul_(RHO[max(stage - 1, 0)] / rho)
                for _ in range(steps_of(stage, self.config.admm_iterations)):
                    splitting.step(product)
        for name, weight in weights.items():
            best = minimise_on_support(splittings[name].sparse, weight, factor.value, FINISHING_STEPS)
            weight.copy_(best.div_(factor.scale))

    def flops(self, out_features: int, in_features: int) -> float:
        products = self.config.admm_iterations + FINISHING_STEPS + 1
        return len(RHO) * in_features**3 + 2.0 * products * out_features * in_features**2


class Splitting:
    """State of one map in scaled coordinates, each [out, in] fp32: dense W, sparse Z, dual U."""

    def __init__(self, dense: Tensor, pattern: SparsityPattern):
        self.dense, self.pattern = dense, pattern
        self.sparse = torch.where(choose(dense, pattern), dense, 0.0)
        self.dual = torch.zeros_like(dense)

    def step(self, product: Tensor) -> None:
        """One iteration; product is P [in, in] of this stage's rho."""
        target = (self.sparse - self.dual).sub_(self.dense)
        total = torch.addmm(self.dense, target, product)  # Y
        total.lerp_(self.sparse, 1 - RELAXATION).add_(self.dual)  # T
        self.sparse = torch.where(choose(total, self.pattern), total, 0.0)
        torch.sub(total, self.sparse, out=self.dual)


def steps_of(stage: int, iterations: int) -> int:
    """Of all iterations those of one stage; every stage has as many, or one more."""
    return iterations * (stage + 1) // len(RHO) - iterations * stage // len(RHO)


def inverse(hessian: Tensor, rho: float) -> Tensor | None:
    """P = rho (H + rho I)^-1 [in, in], or None where the factorisation fails."""
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    lower, failed = torch.linalg.cholesky_ex(shifted)
    return None if failed else torch.cholesky_inverse(lower).mul_(rho)


def choose(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """Mask of the largest magnitudes: n of every m, or of the whole weight [out, in] its part."""
    if pattern.is_structured:
        return select_nm(weight, n=pattern.n, m=pattern.m)
    keep = weight.numel() - pattern.zeros(*weight.shape)
    with as_one_row(weight):
        return select_rows(weight.reshape(1, -1), keep=keep).view(weight.shape)


def minimise_on_support(sparse: Tensor, dense: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Weights W' [out, in] with the zeros of `sparse` that lower tr (W' - W) H (W' - W)^T, each row by conjugate gradients.

    Every row has its own step sizes. Of H with ones on its diagonal these steps are those of Jacobi's preconditioner.
    """
    weight, support = sparse.clone(), sparse != 0
    residual = ((dense - weight) @ hessian).mul_(support)
    direction, size = residual.clone(), residual.square().sum(dim=1, keepdim=True)  # [out, 1]
    for _ in range(steps):
        image = (direction @ hessian).mul_(support)
        step = size / (direction * image).sum(dim=1, keepdim=True).clamp_min_(TINY)
        weight.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1.0)
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(size / before.clamp_min(TINY)).add_(residual)
    return weight
