"""ADMM against its equations in float64, and against the other solvers' errors on Gram matrices like a language model's."""

import copy

import oracle
import pytest
import torch
from torch import Tensor

from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.methods import create
from wandapp.methods.admm import RHO, inverse, minimise_on_support, steps_of
from wandapp.methods.second_order import SecondOrder
from wandapp.pattern import SparsityPattern
from wandapp.pipeline import prune
from wandapp.verify import verify_model

PATTERNS = ["2:4", "1:4", "3:8", "0.5", "0.7"]
STAGES = [(rho, steps_of(stage, PruneConfig().admm_iterations)) for stage, rho in enumerate(RHO)]


pytestmark = pytest.mark.usefixtures("one_thread")


def layer(seed: int, rows: int = 24, columns: int = 64, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """(weight, Hessian) fp64 of inputs that share directions, have a mean, and a few features of a hundredfold size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    decay = torch.arange(1, columns + 1) ** -0.7
    x = (
        normal(tokens, columns) * decay @ normal(columns, columns)
        + 0.3 * normal(columns)
        + 0.05 * normal(tokens, columns)
    )
    x = x * normal(columns).exp()
    x[:, 5] *= 100.0
    return normal(rows, columns) / columns**0.5, 2 * x.T @ x


def solved(method: str, weight: Tensor, hessian: Tensor, pattern: str, **options) -> Tensor:
    """The method's weight for one map, fp64."""
    solver = create(PruneConfig(method=method, sparsity=pattern, **options), Ranks())
    assert isinstance(solver, SecondOrder)
    factor = solver.factorise(hessian.float(), solver.config.damping)
    result = {"map": weight.float()}
    solver.solve_(result, factor, SparsityPattern.parse(pattern))
    return result["map"].double()


def error(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """tr (W' - W) H (W' - W)^T."""
    difference = weight - dense
    return (difference @ hessian * difference).sum().item()


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    return hessian + damping * torch.diag(hessian.diagonal())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_and_weights_are_those_of_the_equations(pattern):
    for seed in range(3):
        weight, hessian = layer(seed)
        expected, keep = oracle.admm(weight, hessian, oracle.Pattern.parse(pattern), STAGES)
        got = solved("admm", weight, hessian, pattern)
        assert ((got != 0) != keep).double().mean() <= 0.002
        calm = ~((got != 0) != keep).any(dim=1)
        assert calm.sum() >= 0.8 * len(calm)
        least, most = (error(w[calm], weight[calm], damped(hessian)) for w in (expected, got))
        assert (
            least <= most * (1 + 1e-6) and most <= 1.005 * least
        )  # a few steps of conjugate gradients from the minimum


def test_the_equations_would_tell_another_schedule_apart():
    weight, hessian = layer(0)
    got = solved("admm", weight, hessian, "2:4")
    pattern = oracle.Pattern.parse("2:4")
    no_relaxation = oracle.admm(weight, hessian, pattern, STAGES, relaxation=1.0)[1]
    other_rho = oracle.admm(weight, hessian, pattern, [(1.1 * rho, count) for rho, count in STAGES])[1]
    for keep in (no_relaxation, other_rho):
        assert ((got != 0) != keep).double().mean() > 0.002


def test_conjugate_gradients_reach_the_minimum_on_the_support():
    weight, hessian = layer(0)
    scale = hessian.diagonal().sqrt()
    scaled, dense = damped(hessian) / torch.outer(scale, scale), weight * scale
    mask = oracle.keep_nm(dense.abs(), 2, 4)
    mask[3] = False  # a row without a kept weight
    expected = oracle.least_squares_on_support(dense, scaled, mask)
    got = minimise_on_support((dense * mask).float(), dense.float(), scaled.float(), steps=200)
    assert torch.equal(got != 0, mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_error_is_below_that_of_sparsegpt_and_of_the_best_weights_on_wandas_mask(pattern):
    ratios = []
    for seed in range(8):
        weight, hessian = layer(seed)
        own = error(solved("admm", weight, hessian, pattern), weight, hessian)
        score = (weight * hessian.diagonal().sqrt()).abs()
        wanda = oracle.least_squares_on_support(weight, damped(hessian), oracle.Pattern.parse(pattern).keep(score))
        assert own < error(wanda, weight, hessian)
        ratios.append(own / error(solved("sparsegpt", weight, hessian, pattern), weight, hessian))
        assert ratios[-1] < 1
    assert sum(ratios) / len(ratios) < 0.85, ratios


@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_few_iterations_hold_the_pattern_and_more_lower_the_error(iterations):
    weight, hessian = layer(0)
    few, many = (solved("admm", weight, hessian, "2:4", admm_iterations=count) for count in (iterations, 32))
    assert ((few != 0).view(-1, 4).sum(dim=1) <= 2).all()
    assert error(many, weight, hessian) < error(few, weight, hessian)
    assert sum(steps_of(stage, iterations) for stage in range(len(RHO))) == iterations


def test_maps_of_one_input_are_solved_as_if_alone():
    (first, hessian), (second, _) = layer(0), layer(1)
    solver = create(PruneConfig(method="admm", sparsity="0.5"), Ranks())
    together = {"first": first.float(), "second": second.float()}
    solver.solve_(together, solver.factorise(hessian.float(), 0.01), SparsityPattern.parse("0.5"))
    assert torch.equal(together["first"].double(), solved("admm", first, hessian, "0.5"))
    assert torch.equal(together["second"].double(), solved("admm", second, hessian, "0.5"))


def test_what_cannot_be_factorised_is_refused():
    assert inverse(-torch.eye(4), 0.5) is None
    torch.testing.assert_close(inverse(torch.eye(4), 0.5), torch.eye(4) / 3)


def test_dead_inputs_and_fewer_tokens_than_inputs(tiny_model):
    """Rho makes every Hessian positive definite: no damping beyond the option's is needed, and none is told."""
    model, tokens = tiny_model("llama", num_hidden_layers=1)[0], torch.randint(0, 250, (1, 8))
    columns = [4, 5, 6, 21]
    with torch.no_grad():
        oracle.decoder_blocks(model)[0].input_layernorm.weight[columns] = 0
    for pattern in ("2:4", "0.5"):
        tested = copy.deepcopy(model)
        report = prune(tested, calibration=tokens, method="admm", sparsity=pattern, damping=1e-7)
        assert not report.warnings and verify_model(tested, pattern).ok
        assert not oracle.decoder_blocks(tested)[0].self_attn.q_proj.weight[:, columns].any()
        assert tested(tokens).logits.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_of_transposed_maps_and_experts(tiny_model, family):
    """Every block's error is below SparseGPT's on the same inputs; GPT-2 stores its matrices transposed."""
    dense = tiny_model(family, **({"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}))[0]
    tokens, errors = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0)), {}
    for method in ("admm", "sparsegpt"):
        tested = copy.deepcopy(dense)
        errors[method] = prune(tested, calibration=tokens, method=method, sparsity="2:4").blocks[0].error
        assert verify_model(tested, "2:4").ok
    assert errors["admm"] < 0.9 * errors["sparsegpt"]
