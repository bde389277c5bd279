"""What methods that solve a layer from the Gram matrix of its inputs share (SparseGPT, ADMM).

Each map's W' minimises ||X W'^T - X W^T||^2 in fp32, which H = (2/N) sum_n X_n^T X_n is all that is needed for. H is damped
and factorised once for all maps that it feeds; where that fails, damping is raised tenfold, and told.
"""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.errors import WandappError
from wandapp.methods.base import BlockRecord, Method, ScoreTerms
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements

DAMPING_STEPS = 3  # tenfold each
Factor = TypeVar("Factor")  # what a method makes of a damped H


class SecondOrder(Method, ABC, Generic[Factor]):
    """A method supplies `factorise`, `solve_`, their FLOPs, and `terms` for what asks for its score afterwards."""

    needs = frozenset({"hessian"})
    compensates = True
    title = ""  # in errors

    @abstractmethod
    def factorise(self, hessian: Tensor, damping: float) -> Factor | None:
        """What `solve_` reads of hessian [in, in] fp32, which has no zero on its diagonal; None where that fails.

        damping   a fraction of the diagonal
        """

    @abstractmethod
    def solve_(self, weights: dict[str, Tensor], factor: Factor, pattern: SparsityPattern) -> None:
        """Prunes the weights [out, in] fp32 of all maps that one input feeds, by name, and changes what they keep."""

    @abstractmethod
    def flops(self, out_features: int, in_features: int) -> float:
        """Of solving one input's maps, which have out_features together, factorisation included."""

    def order_terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        """Wanda's: the solver's own scores depend on the order that is looked for."""
        return ScoreTerms(measured.hessians[view.name].value.diagonal().sqrt())

    def apply(self, block: DecoderBlock, measured: Measurements, pattern: SparsityPattern, record: BlockRecord) -> None:
        shared: dict[int, list[LinearView]] = {}  # by their Hessian
        for view in block.linears.values():
            if view.is_expert and not measured.tokens.get(view.name):
                self.prune_linear_(view, view.weight, self.checked_terms(view, measured, record), pattern)
            else:
                shared.setdefault(id(measured.hessians[view.name]), []).append(view)
        for views in shared.values():
            hessian = measured.hessians[views[0].name].value
            factor = self._factor(views[0].name, hessian, record)
            weights = {view.name: _master(view, hessian) for view in views}
            self.solve_(weights, factor, pattern)
            del factor
            block.flops += self.flops(sum(map(len, weights.values())), len(hessian))
            for view in views:
                stored = weights[view.name].to(view.weight.dtype)
                if not torch.isfinite(stored).all():
                    raise WandappError(f"{view.name}: {self.title}'s weights are not finite; raise --damping")
                view.weight.copy_(stored)

    def _factor(self, name: str, hessian: Tensor, record: BlockRecord) -> Factor:
        """The factor of hessian [in, in] at the least damping that serves."""
        if not torch.isfinite(hessian).all():
            raise WandappError(f"{name}: the Hessian of its inputs holds NaN or Inf; use a wider --dtype")
        hessian = hessian.clone()
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1.0
        damping = self.config.damping
        for step in range(DAMPING_STEPS + 1):
            factor = self.factorise(hessian, damping * 10**step)
            if factor is not None:
                if step:
                    record.warnings.append(
                        f"{name}: Hessian not positive definite, damping raised to {damping * 10**step:g}"
                    )
                return factor
        raise WandappError(
            f"{name}: the Hessian cannot be factorised even with damping {damping * 10**DAMPING_STEPS:g}; "
            "use more or other calibration text, or a larger --damping"
        )


def _master(view: LinearView, hessian: Tensor) -> Tensor:
    """A copy of the weight [out, in] in fp32 that reads no input that was zero for every token."""
    weight = view.weight.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    weight[:, hessian.diagonal() == 0] = 0.0
    return weight
