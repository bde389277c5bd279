"""Exact sparsity after every method, and inputs that are hard: NaN, singular Hessians, experts without tokens, batches."""

import functools

import oracle
import pytest
import tiny
import torch
from torch import Tensor

from wandapp.distributed import Ranks
from wandapp.methods.sparsegpt import solve_
from wandapp.pattern import SparsityPattern
from wandapp.pipeline import prune
from wandapp.statistics import measure
from wandapp.store import ModelStore
from wandapp.verify import verify_model

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = [
    *("magnitude", "wanda", "wanda-cumulative", "sparsegpt", "admm", "gblm", "rgs"),
    *("magnitude+ro", "wanda+ro", "gblm+ro", "rgs+ro", "sparsegpt+ro", "admm+ro"),
]


def calibration(samples: int = 4, seq_len: int = 24) -> Tensor:
    return torch.randint(0, 250, (samples, seq_len), generator=torch.Generator().manual_seed(0))


pruned_copy = functools.partial(tiny.pruned_copy, preset="paper")


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama", num_hidden_layers=2)[0]


@pytest.fixture(params=["llama", "gpt2"])
def family_model(request, tiny_model):
    """Two families; GPT-2 stores its matrices transposed and has biases everywhere."""
    return tiny_model(request.param)[0]


def removed_per_group(weight: Tensor, group: int) -> Tensor:
    return (weight == 0).reshape(-1, group).sum(dim=-1)


@pytest.mark.parametrize("pattern", ["0.5", "0.3", "2:4", "4:8", "1:4", "3:8"])
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_is_exact(llama, method, pattern):
    options = dict(magnitude_group="row") if method.startswith("magnitude") else {}
    tested, _ = pruned_copy(
        llama, calibration(2), method=method, sparsity=pattern, **options, ro_lr=1e-4, ro_rounds=1, ro_samples=2
    )
    assert verify_model(tested, pattern).ok
    for block in oracle.decoder_blocks(tested):
        for name, matrix in oracle.matrices(block).items():
            weight = matrix.weight
            if ":" in pattern:
                n, m = map(int, pattern.split(":"))
                assert (removed_per_group(weight, m) == m - n).all(), name
            elif method == "wanda-cumulative":
                assert (weight == 0).double().mean().item() == pytest.approx(float(pattern), abs=0.0011), name
            elif method == "sparsegpt":
                for columns in weight.split(128, dim=1):
                    assert (columns == 0).sum() == int(columns.numel() * float(pattern)), name
            elif method == "admm":
                assert (weight == 0).sum() == len(weight) * int(weight.shape[1] * float(pattern)), name
            elif method not in ("sparsegpt+ro", "admm+ro"):
                assert (removed_per_group(weight, weight.shape[1]) == int(weight.shape[1] * float(pattern))).all()


@pytest.mark.parametrize(
    "method", ["magnitude", "wanda", "sparsegpt", "admm", "gblm", "rgs", "wanda++", "sparsegpt+ro"]
)
def test_one_sample_is_enough(llama, method):
    tested, _ = pruned_copy(llama, calibration(1), method=method, sparsity="2:4")
    assert verify_model(tested, "2:4").ok
    assert tested(calibration(1)).logits.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["wanda", "wanda-cumulative", "sparsegpt", "admm", "rgs", "wanda++"])
def test_activations_that_are_not_finite_name_the_layer(llama, method, value):
    with torch.no_grad():
        oracle.decoder_blocks(llama)[1].post_attention_layernorm.weight[3] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\."):
        prune(llama, calibration=calibration(), method=method, sparsity="2:4")


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "wanda-cumulative", "sparsegpt", "admm"])
def test_weights_that_are_not_finite_name_layer_row_and_column(tiny_model, method, pattern):
    model = tiny_model("llama", num_hidden_layers=2, intermediate_size=192)[0]
    with torch.no_grad():
        oracle.decoder_blocks(model)[1].mlp.down_proj.weight[3, 140] = float(
            "nan"
        )  # beyond SparseGPT's first column block
    place = "3, column 140" if method != "admm" else "3, column"  # its products spread a NaN over the row
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.down_proj: score at row {place}"):
        prune(model, calibration=calibration(), method=method, sparsity=pattern)


@pytest.mark.parametrize("damping, is_enough", [(1e-7, True), (1e-12, False)])
def test_a_hessian_that_cannot_be_factorised_is_damped_more_and_named(llama, damping, is_enough):
    options = dict(method="sparsegpt", sparsity="2:4", damping=damping)
    if is_enough:
        tested, report = pruned_copy(llama, calibration(1, 8), **options)
        assert any("model.layers.0.mlp.down_proj" in line and "damping" in line for line in report.warnings)
        assert verify_model(tested, "2:4").ok
    else:
        with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj"):
            pruned_copy(llama, calibration(1, 8), **options)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gblm", "wanda++"])
def test_the_model_keeps_its_state(tiny_model, method):
    """Dropout is off while pruning; training mode, frozen parameters and absent gradients are as before."""
    dense = tiny_model("gpt2", num_hidden_layers=2)[0]
    dense.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    options = dict(method=method, sparsity="2:4", ro_rounds=1, ro_samples=2)
    expected, _ = pruned_copy(dense, calibration(), **options)
    tested, _ = pruned_copy(dense.train(), calibration(), **options)
    assert all(module.training for module in tested.modules())
    for wanted, got, before in zip(expected.parameters(), tested.parameters(), dense.parameters(), strict=True):
        assert torch.equal(wanted, got)
        assert got.grad is None
        assert got.requires_grad == before.requires_grad


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "wanda++"])
def test_an_expert_without_tokens_is_reported(tiny_model, family, method):
    """Two tokens reach at most four of eight experts."""
    count = dict(num_local_experts=8) if family == "mixtral" else dict(num_experts=8)
    dense = tiny_model(family, **count)[0]
    tested, report = pruned_copy(dense, calibration(1, 2), method=method, sparsity="2:4")
    for i in range(len(oracle.decoder_blocks(dense))):
        assert any("expert" in line and f"model.layers.{i}." in line for line in report.warnings), report.warnings
    assert tested(calibration(1)).logits.isfinite().all()


def test_an_expert_that_no_drawn_sample_reaches_is_measured_by_all(tiny_model):
    """Of norms that are all zero the scores tie, and position would choose."""
    model, _ = tiny_model("qwen3_moe", num_experts=16, num_hidden_layers=1)
    model.config._experts_implementation = "eager"  # as a run sets it
    store = ModelStore(model, SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    with torch.no_grad():
        hidden = store.record(calibration(8, 2), 1)
        with store.open_block(0) as block:
            measured = measure(block, hidden, frozenset({"column_norm"}), Ranks())
    undrawn = 0
    for view in block.linears.values():
        norm = measured.norms.get(view.name)
        if norm is None:  # no sample at all reached this expert
            continue
        for sample in range(8):
            value = measured.among(torch.tensor([sample])).column_norm(view)
            reached = norm.sumsq[sample].any()
            assert torch.equal(value, norm.value(torch.tensor([sample])) if reached else norm.value()) and value.any()
            undrawn += not reached
    assert undrawn


def test_gblm_takes_samples_one_by_one_wherever_experts_come(tiny_model):
    dense = tiny_model("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=2)[0]
    single, _ = pruned_copy(dense, calibration(), method="gblm", sparsity="2:4", batch_size=1)
    batched, _ = pruned_copy(dense, calibration(), method="gblm", sparsity="2:4", batch_size=4)
    assert disputed_fraction(single, batched) <= 1e-4


@pytest.mark.parametrize("fraction", ["0.6", "0.7"])
def test_a_map_of_one_row_gets_its_zeros(fraction):
    """As Qwen2-MoE's shared_expert_gate: every column block takes a whole number, and they add up."""
    weight = torch.randn(1, 320, generator=torch.Generator().manual_seed(0))
    solve_(weight, torch.eye(320), SparsityPattern(float(fraction)))
    assert (weight == 0).sum() == int(320 * float(fraction))


def test_cumulative_says_what_it_cannot_remove(llama):
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: wanda-cumulative removes .* use --method wanda"
    ):
        prune(llama, calibration=calibration(), method="wanda-cumulative", sparsity="0.97")


def test_cumulative_prunes_an_expert_without_tokens_by_magnitude(tiny_model):
    tested, report = pruned_copy(
        tiny_model("qwen3_moe", num_experts=8)[0], calibration(1, 2), method="wanda-cumulative", sparsity="0.5"
    )
    assert any("pruned by magnitude alone" in line for line in report.warnings)
    assert verify_model(tested, "0.5").ok


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_a_faint_input_gets_no_enormous_weight(llama, method):
    """Inputs of down_proj that are 100,000 times smaller than others: little is known of them, and little is gained."""
    llama = llama.half()
    with torch.no_grad():
        oracle.decoder_blocks(llama)[0].mlp.up_proj.weight[:8] *= 1e-5
    tested, _ = pruned_copy(llama, calibration(), method=method, sparsity="2:4")
    weight = oracle.decoder_blocks(tested)[0].mlp.down_proj.weight.abs()
    assert weight[:, :8].max() < 10 * weight[:, 8:].max()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda+reconstruct"])
def test_no_zero_is_negative_where_weights_underflow(llama, method):
    with torch.no_grad():
        for block in oracle.decoder_blocks(llama):
            for matrix in oracle.matrices(block).values():
                matrix.weight.mul_(2e-5)
    tested, _ = pruned_copy(llama.half(), calibration(), method=method, sparsity="3:4")
    assert verify_model(tested, "3:4").negative_zeros == 0


def test_every_forward_of_experts_is_counted(tiny_model):
    model, _ = tiny_model("mixtral")
    model.config._experts_implementation = "eager"  # as a run sets it
    store = ModelStore(model, SparsityPattern.parse("2:4"), device=torch.device("cpu"))
    with torch.no_grad():
        hidden = store.record(calibration(), 2)
        with store.open_block(0) as block:
            block.run_(hidden.clone())
            block.watch(hidden[:2], lambda *of: None)
            counted, block.flops = block.flops, 0.0
            block.run_(hidden.clone())
            assert counted == pytest.approx(1.5 * block.flops, rel=0.05)  # a half of the samples was watched
        with store.open_block(0) as block:
            block.run_(hidden.clone())
            assert block.flops == pytest.approx(counted / 1.5, rel=0.05)


def disputed_fraction(a, b) -> float:
    """Fraction of parameters that are zero in one model only."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return sum(int(((x != 0) != (y != 0)).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


@pytest.mark.parametrize("method", ["wanda", "gblm", "rgs"])
def test_batch_size_does_not_change_the_choice(family_model, method):
    single, _ = pruned_copy(family_model, calibration(), method=method, sparsity="2:4", batch_size=1)
    batched, _ = pruned_copy(family_model, calibration(), method=method, sparsity="2:4", batch_size=4)
    assert disputed_fraction(single, batched) <= 1e-4


def test_batch_size_does_not_change_the_choice_of_sparsegpt(family_model):
    """Of the first block: compensation carries one swap of equal scores on, to its row and to all later blocks."""
    single, _ = pruned_copy(family_model, calibration(16), method="sparsegpt", sparsity="2:4", batch_size=1)
    batched, _ = pruned_copy(family_model, calibration(16), method="sparsegpt", sparsity="2:4", batch_size=4)
    assert disputed_fraction(oracle.decoder_blocks(single)[0], oracle.decoder_blocks(batched)[0]) <= 1e-3
