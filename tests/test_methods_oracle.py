"""Every method against its equations in float64 (oracle.py), block by block, each fed by the tested blocks before it.

Rounding may only swap scores that are almost equal: a test states how many weights may change places and how far apart
(relatively) their scores may be: statistics are fp32 in the library, so 1e-5; gradients pass a whole block, 1e-4.
"""

import copy
import functools
import itertools

import oracle
import pytest
import tiny
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = {"llama": dict(intermediate_size=320), "gpt2": dict(n_inner=320)}  # wider than SparseGPT's 128-column blocks
SAMPLES, SEQ_LEN = 4, 24  # 96 tokens: fewer than 320 inputs, more than 64
GAP, GRADIENT_GAP = 1e-5, 1e-4


def calibration(samples: int = SAMPLES, seq_len: int = SEQ_LEN) -> Tensor:
    return torch.randint(0, 250, (samples, seq_len), generator=torch.Generator().manual_seed(0))


pruned_copy = functools.partial(tiny.pruned_copy, preset="paper")


def on_tested_path(dense, tested, tokens):
    """(index, dense float64 block, its calls, tested matrices) for every block, fed by the tested blocks before it."""
    reference = oracle.float64_copy(dense)
    pairs = zip(oracle.decoder_blocks(reference), oracle.decoder_blocks(tested), strict=True)
    for i, (block, tested_block) in enumerate(pairs):
        yield i, block, oracle.block_calls(reference, block, tokens), oracle.matrices(tested_block)
        block.load_state_dict(tested_block.state_dict())


def column_scales(block, calls) -> dict[str, Tensor]:
    return oracle.column_norms(oracle.layer_inputs(block, calls))


def assert_same_choice(agreements: list, gap: float) -> None:
    disputed, total = sum(a.disputed for a in agreements), sum(a.total for a in agreements)
    assert disputed <= 0.001 * total, f"{disputed} of {total} weights differ"
    assert max(a.gap for a in agreements) <= gap


def group_of(pattern: str, weight: Tensor) -> int:
    return int(pattern.split(":")[1]) if ":" in pattern else weight.shape[1]


def compare_scores(dense, tested, tokens, pattern: str, scores) -> list:
    """Agreement of every matrix; scores(index, block, calls, named matrices) -> name -> score."""
    found = []
    for i, block, calls, tested_matrices in on_tested_path(dense, tested, tokens):
        for name, s in scores(i, block, calls, oracle.matrices(block)).items():
            kept = tested_matrices[name].weight != 0
            found.append(oracle.agreement(kept, oracle.Pattern.parse(pattern).keep(s), s, group_of(pattern, s)))
    return found


def magnitude_scores(i, block, calls, named):
    return {name: oracle.score(matrix.weight) for name, matrix in named.items()}


def wanda_scores(i, block, calls, named):
    scales = column_scales(block, calls)
    return {name: oracle.score(matrix.weight, scales[name]) for name, matrix in named.items()}


def rgs_scores(alpha: float, per_token: bool = False):
    def scores(i, block, calls, named):
        scales, gradients = column_scales(block, calls), oracle.regional_gradients(block, calls, per_token=per_token)
        return {name: oracle.score(m.weight, scales[name], gradients[name], alpha) for name, m in named.items()}

    return scores


def gblm_scores(model_gradients: list, alpha: float):
    def scores(i, block, calls, named):
        scales = column_scales(block, calls)
        return {
            name: oracle.score(m.weight, scales[name], model_gradients[i][name], alpha) for name, m in named.items()
        }

    return scores


@pytest.fixture(params=["llama", "gpt2"])
def wide(request, tiny_model):
    """Dense models of two families; GPT-2 stores its matrices transposed and has biases everywhere."""
    return tiny_model(request.param, **WIDE[request.param])[0]


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama", num_hidden_layers=2)[0]


def test_oracle_gradient_matches_central_differences(wide):
    reference = oracle.float64_copy(wide)
    tokens = calibration(2)
    block = oracle.decoder_blocks(reference)[1]
    calls, named = oracle.block_calls(reference, block, tokens), oracle.matrices(block)
    gradients = oracle.regional_gradients(block, calls)
    for name, matrix in named.items():
        for row, column in [(0, 0), (3, 17), (31, 63)]:
            slopes = []
            for call in calls:
                ends = []
                for step in (1e-5, -2e-5, 1e-5):
                    matrix.weight[row, column] += step
                    ends.append(oracle.regional_loss(block, call).item())
                slopes.append((ends[0] - ends[1]) / 2e-5)
            rms = (sum(slope**2 for slope in slopes) / len(slopes)) ** 0.5
            assert gradients[name][row, column].item() == pytest.approx(rms, rel=1e-5, abs=1e-9)


def test_oracle_model_gradient_matches_central_differences(wide):
    reference, tokens = oracle.float64_copy(wide), calibration(1)
    gradients = oracle.model_gradients(reference, tokens, oracle.mean_absolute)
    name, matrix = next(iter(oracle.matrices(oracle.decoder_blocks(reference)[0]).items()))
    matrix.weight[3, 5] += 1e-5
    above = oracle.causal_loss(reference, tokens[0]).item()
    matrix.weight[3, 5] -= 2e-5
    below = oracle.causal_loss(reference, tokens[0]).item()
    assert gradients[0][name][3, 5].item() == pytest.approx(abs(above - below) / 2e-5, rel=1e-5)


def test_oracle_sparsegpt_reduces_to_magnitude_for_uncorrelated_inputs():
    weight = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pruned, keep = oracle.sparsegpt(weight, torch.eye(16, dtype=torch.float64), oracle.Pattern.parse("2:4"))
    assert torch.equal(keep, oracle.keep_nm(weight.abs(), 2, 4))
    torch.testing.assert_close(pruned, weight * keep)


def test_oracle_sparsegpt_equals_its_cholesky_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 12, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    pruned, keep = oracle.sparsegpt(weight, x.T @ x, oracle.Pattern.parse("1:4"))

    damped = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(12, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for c in range(12):
        error = torch.where(keep[:, c], 0.0, weight[:, c]) / upper[c, c]
        weight[:, c:] -= torch.outer(error, upper[c, c:])
    torch.testing.assert_close(pruned, weight)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "0.5"])
def test_magnitude(wide, pattern):
    tested, _ = pruned_copy(wide, calibration(), method="magnitude", sparsity=pattern, magnitude_group="row")
    assert_same_choice(compare_scores(wide, tested, calibration(), pattern, magnitude_scores), gap=0)


@pytest.mark.parametrize("sparsity", ["0.5", "0.3"])
def test_magnitude_with_one_threshold_per_matrix(wide, sparsity):
    tested, _ = pruned_copy(wide, calibration(), method="magnitude", sparsity=sparsity, magnitude_group="matrix")
    for block, tested_block in zip(oracle.decoder_blocks(wide), oracle.decoder_blocks(tested), strict=True):
        for name, matrix in oracle.matrices(block).items():
            keep = oracle.keep_matrix(matrix.weight.abs(), float(sparsity))
            assert torch.equal(oracle.matrices(tested_block)[name].weight, matrix.weight * keep), name


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "0.5", "0.3"])
def test_wanda(wide, pattern):
    tested, _ = pruned_copy(wide, calibration(), method="wanda", sparsity=pattern)
    assert_same_choice(compare_scores(wide, tested, calibration(), pattern, wanda_scores), GAP)


def test_wanda_on_every_family(tiny_model, tiny_family):
    dense, tokens = tiny_model(tiny_family)[0], calibration()
    tested, _ = pruned_copy(dense, tokens, method="wanda", sparsity="2:4")
    assert_same_choice(compare_scores(dense, tested, tokens, "2:4", wanda_scores), GAP)


def test_wanda_keeps_the_kept_weights(wide):
    tested, _ = pruned_copy(wide, calibration(), method="wanda", sparsity="2:4")
    for before, after in zip(wide.parameters(), tested.parameters(), strict=True):
        assert torch.equal(torch.where(after != 0, before, 0.0), after)


def test_wanda_cumulative(wide):
    tokens = calibration()
    tested, _ = pruned_copy(wide, tokens, method="wanda-cumulative", sparsity="0.5")
    found = []
    for _, block, calls, tested_matrices in on_tested_path(wide, tested, tokens):
        for name, s in wanda_scores(0, block, calls, oracle.matrices(block)).items():
            kept = tested_matrices[name].weight != 0
            found.append(oracle.agreement(kept, oracle.keep_cumulative(s, 0.5), s, s.shape[1]))
            assert (~kept).double().mean().item() == pytest.approx(0.5, abs=0.0011), name
    assert_same_choice(found, GAP)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("alpha", [100.0, 1e8], ids=["balanced", "gradient_alone"])
def test_regional_gradient_score(wide, pattern, alpha):
    tokens = calibration()
    tested, _ = pruned_copy(wide, tokens, method="rgs", sparsity=pattern, alpha=alpha)
    assert_same_choice(compare_scores(wide, tested, tokens, pattern, rgs_scores(alpha)), GRADIENT_GAP)


def test_regional_gradient_of_tokens_of_equal_size(wide):
    tokens = calibration()
    tested, _ = pruned_copy(wide, tokens, method="rgs", sparsity="2:4", alpha=100.0, regional_loss="token")
    assert_same_choice(compare_scores(wide, tested, tokens, "2:4", rgs_scores(100.0, per_token=True)), GRADIENT_GAP)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_gblm(wide, pattern):
    tokens = calibration()
    tested, _ = pruned_copy(wide, tokens, method="gblm", sparsity=pattern)
    gradients = oracle.model_gradients(oracle.float64_copy(wide), tokens, oracle.root_mean_square)
    scores = gblm_scores(gradients, 100 * SAMPLES**0.5)
    assert_same_choice(compare_scores(wide, tested, tokens, pattern, scores), GRADIENT_GAP)


def test_gblm_with_mean_absolute_gradients(wide):
    tokens = calibration()
    tested, _ = pruned_copy(wide, tokens, method="gblm", sparsity="2:4", gblm_norm="l1", alpha=1e8)
    gradients = oracle.model_gradients(oracle.float64_copy(wide), tokens, oracle.mean_absolute)
    assert_same_choice(compare_scores(wide, tested, tokens, "2:4", gblm_scores(gradients, 1e8)), GRADIENT_GAP)


def test_gblm_of_experts(tiny_model):
    dense, tokens = tiny_model("mixtral")[0], calibration()
    tested, _ = pruned_copy(dense, tokens, method="gblm", sparsity="2:4")
    gradients = oracle.model_gradients(oracle.float64_copy(dense), tokens, oracle.root_mean_square)
    scores = gblm_scores(gradients, 100 * SAMPLES**0.5)
    assert_same_choice(compare_scores(dense, tested, tokens, "2:4", scores), GRADIENT_GAP)


def test_regional_gradient_score_of_experts(tiny_model):
    dense, tokens = tiny_model("mixtral")[0], calibration()
    tested, _ = pruned_copy(dense, tokens, method="rgs", sparsity="2:4", alpha=100.0)
    assert_same_choice(compare_scores(dense, tested, tokens, "2:4", rgs_scores(100.0)), GRADIENT_GAP)


def test_wrong_normalisations_would_be_seen(llama):
    """The comparisons above can tell a sum over samples from a mean, for norms against gradients."""
    tokens = calibration()
    tested, _ = pruned_copy(llama, tokens, method="rgs", sparsity="2:4", alpha=100.0)
    for alpha in (100.0 * SAMPLES**0.5, 100.0 / SAMPLES**0.5):
        found = compare_scores(llama, tested, tokens, "2:4", rgs_scores(alpha))
        assert sum(a.disputed for a in found) > 0.01 * sum(a.total for a in found)


def compare_sparsegpt(dense, tested, tokens, pattern: str, damping: float = 0.01) -> None:
    """At most 0.1 % of the mask differs, and in the rows without a difference the weights agree to 1e-3."""
    disputed = total = 0
    for _, block, calls, tested_matrices in on_tested_path(dense, tested, tokens):
        hessians = oracle.hessians(oracle.layer_inputs(block, calls))
        for name, matrix in oracle.matrices(block).items():
            weight, keep = oracle.sparsegpt(
                matrix.weight, hessians[name], oracle.Pattern.parse(pattern), damping=damping
            )
            got = tested_matrices[name].weight.double()
            differs = (got != 0) != (weight != 0)
            disputed, total = disputed + int(differs.sum()), total + differs.numel()
            calm = ~differs.any(dim=1)
            torch.testing.assert_close(got[calm], weight[calm], rtol=1e-3, atol=1e-3 * weight.abs().mean().item())
    assert disputed <= 0.001 * total, f"{disputed} of {total} weights differ"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8", "0.5", "0.3"])
def test_sparsegpt(wide, pattern):
    tested, _ = pruned_copy(wide, calibration(), method="sparsegpt", sparsity=pattern)
    compare_sparsegpt(wide, tested, calibration(), pattern)


def test_sparsegpt_of_experts(tiny_model):
    dense = tiny_model("mixtral")[0]
    tested, _ = pruned_copy(dense, calibration(), method="sparsegpt", sparsity="2:4")
    compare_sparsegpt(dense, tested, calibration(), "2:4")


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_sparsegpt_with_fewer_tokens_than_inputs(llama, damping):
    tokens = calibration(1, 8)
    tested, _ = pruned_copy(llama, tokens, method="sparsegpt", sparsity="2:4", damping=damping)
    compare_sparsegpt(llama, tested, tokens, "2:4", damping)


def kill_inputs(model, columns: list[int]) -> None:
    """These inputs of q, k and v of the first block are zero for every token."""
    with torch.no_grad():
        oracle.decoder_blocks(model)[0].input_layernorm.weight[columns] = 0


def test_sparsegpt_zeroes_dead_columns(llama):
    columns = [4, 5, 6, 21]
    kill_inputs(llama, columns)
    tested, _ = pruned_copy(llama, calibration(), method="sparsegpt", sparsity="2:4")
    attention = oracle.decoder_blocks(tested)[0].self_attn
    assert not attention.q_proj.weight[:, columns].any()
    compare_sparsegpt(llama, tested, calibration(), "2:4")


def test_wanda_with_dead_columns_keeps_the_lower_of_equal_scores(llama):
    kill_inputs(llama, [4, 5, 6])
    tested, _ = pruned_copy(llama, calibration(), method="wanda", sparsity="2:4")
    kept = oracle.decoder_blocks(tested)[0].self_attn.q_proj.weight[:, 4:8] != 0
    assert torch.equal(kept, torch.tensor([True, False, False, True]).expand_as(kept))


def refined_agreement(dense, tested, tokens, pattern: str, rounds: int, order=None, **options) -> list:
    """For every block (fraction of equal weights, fraction of an equal mask) against the oracle's refinement.

    Equal: zero in both, or within a twentieth of the learning rate (one RMSprop step is up to ten learning rates).
    """
    options = dict(alpha=RO["alpha"], learning_rate=RO["ro_lr"]) | options
    found = []
    for i, block, calls, _ in on_tested_path(dense, tested, tokens):
        gradients = oracle.regional_gradients(block, calls, per_token=options.get("relative", False))
        expected = copy.deepcopy(block)
        calls = [calls[n] for n in order or range(len(calls))]
        oracle.refine(expected, calls, oracle.Pattern.parse(pattern), gradients, rounds=rounds, **options)
        got_matrices = oracle.matrices(oracle.decoder_blocks(tested)[i])
        got = torch.cat([got_matrices[name].weight.flatten() for name in got_matrices]).double()
        wanted = torch.cat([matrix.weight.flatten() for matrix in oracle.matrices(expected).values()])
        same_mask = (got == 0) == (wanted == 0)
        equal = same_mask & ((got - wanted).abs() <= RO["ro_lr"] / 20)
        found.append((equal.double().mean().item(), same_mask.double().mean().item()))
    return found


def assert_refined(found: list) -> None:
    """Two of three blocks agree: two almost equal scores that rounding swaps move every step after them a little."""
    assert sorted(equal for equal, _ in found)[1] >= 0.999, found
    assert min(same_mask for _, same_mask in found) >= 0.999, found


RO = dict(alpha=100.0, ro_lr=1e-4)


@pytest.mark.parametrize("method, alpha", [("rgs+ro", 100.0), ("wanda+ro", 0.0)])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_one_round_on_equal_samples(wide, method, alpha, pattern):
    """Four equal samples: four RMSprop steps whose result does not depend on the order in which samples are drawn."""
    tokens = calibration(1).repeat(4, 1)
    tested, _ = pruned_copy(wide, tokens, method=method, sparsity=pattern, **RO, ro_rounds=1, ro_samples=4)
    assert_refined(refined_agreement(wide, tested, tokens, pattern, 1, alpha=alpha))


def test_one_round_takes_one_step_per_sample_in_some_order(wide):
    tokens = calibration(3)
    tested, _ = pruned_copy(wide, tokens, method="rgs+ro", sparsity="2:4", **RO, ro_rounds=1, ro_samples=3)
    per_order = [refined_agreement(wide, tested, tokens, "2:4", 1, order) for order in itertools.permutations(range(3))]
    assert_refined([max(of_block) for of_block in zip(*per_order, strict=True)])


def test_rounds_on_one_sample(wide):
    tokens = calibration(1)
    tested, _ = pruned_copy(wide, tokens, method="rgs+ro", sparsity="2:4", **RO, ro_rounds=3, ro_samples=1)
    assert_refined(refined_agreement(wide, tested, tokens, "2:4", 3))


def test_pruned_weights_come_back(wide):
    """Steps are large enough to change the mask from round to round, and it changes where the oracle's does."""
    tokens = calibration(1)
    once, _ = pruned_copy(wide, tokens, method="rgs", sparsity="2:4", alpha=100.0)
    tested, _ = pruned_copy(
        wide, tokens, method="rgs+ro", sparsity="2:4", alpha=100.0, ro_lr=1e-3, ro_rounds=4, ro_samples=1
    )
    before, after = (oracle.matrices(oracle.decoder_blocks(model)[0]).values() for model in (once, tested))
    returned = sum(int(((x.weight == 0) & (y.weight != 0)).sum()) for x, y in zip(before, after, strict=True))
    assert returned > 50
    assert_refined(refined_agreement(wide, tested, tokens, "2:4", 4, learning_rate=1e-3))


def test_one_round_on_tokens_and_weights_of_equal_size(wide):
    """Losses per token and steps relative to the weights: as the robust preset has them."""
    tokens = calibration(1).repeat(4, 1)
    options = dict(regional_loss="token", ro_loss="token", ro_lr_unit="weight-rms", alpha=100.0, ro_lr=1e-3)
    tested, _ = pruned_copy(wide, tokens, method="rgs+ro", sparsity="2:4", **options, ro_rounds=1, ro_samples=4)
    assert_refined(refined_agreement(wide, tested, tokens, "2:4", 1, learning_rate=1e-3, relative=True))


def test_rounds_on_experts(tiny_model):
    dense, tokens = tiny_model("mixtral")[0], calibration(1, 64)  # long enough to reach every expert
    tested, _ = pruned_copy(dense, tokens, method="rgs+ro", sparsity="2:4", **RO, ro_rounds=2, ro_samples=1)
    assert_refined(refined_agreement(dense, tested, tokens, "2:4", 2))


@pytest.mark.parametrize("method, factor", [("wanda+ro", 0.9), ("rgs+ro", 0.9), ("sparsegpt+ro", 0.98)])
def test_refinement_lowers_the_regional_error(llama, method, factor):
    """Of the first block, whose inputs are the same with and without refinement."""
    tokens, errors = calibration(8), {}
    for name in (method, method.removesuffix("+ro")):
        tested, _ = pruned_copy(llama, tokens, method=name, sparsity="2:4", **RO, ro_rounds=5, ro_samples=8)
        _, block, calls, _ = next(on_tested_path(llama, tested, tokens))
        targets = [oracle.block_output(block, call).detach() for call in calls]
        block.load_state_dict(oracle.decoder_blocks(tested)[0].state_dict())
        errors[name] = oracle.regional_error(block, calls, targets)
    assert errors[method] < factor * errors[method.removesuffix("+ro")]


def test_refinement_changes_linear_maps_only(llama):
    tested, _ = pruned_copy(llama, calibration(), method="wanda++", sparsity="2:4", **RO, ro_samples=4)
    for (name, before), after in zip(llama.named_parameters(), tested.parameters(), strict=True):
        assert torch.equal(before, after) != name.endswith("proj.weight"), name


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize(
    "method, options",
    [
        ("rgs", dict(alpha=0.0)),
        ("wanda+ro", dict(ro_rounds=0)),
        ("rgs+ro", dict(alpha=0.0, ro_rounds=0)),
        ("wanda++", dict(alpha=0.0, ro_rounds=0)),
    ],
)
def test_without_gradient_and_rounds_it_is_wanda_bit_for_bit(llama, method, options, pattern):
    wanda, _ = pruned_copy(llama, calibration(), method="wanda", sparsity=pattern)
    tested, _ = pruned_copy(llama, calibration(), method=method, sparsity=pattern, **options)
    for expected, got in zip(wanda.parameters(), tested.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_wanda_plus_plus_is_rgs_with_refinement(llama):
    options = dict(sparsity="2:4", **RO, ro_rounds=2, ro_samples=2)
    plus, _ = pruned_copy(llama, calibration(), method="wanda++", **options)
    spelled, _ = pruned_copy(llama, calibration(), method="rgs+ro", **options)
    for expected, got in zip(plus.parameters(), spelled.parameters(), strict=True):
        assert torch.equal(expected, got)
