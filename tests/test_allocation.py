"""Sparsity spread over blocks: OWL's formula by hand, the least error against a search, exact totals, and whole runs."""

import copy
import itertools
import json
import math
import sys

import oracle
import pytest
import ranks as harness
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wandapp import save_pruned
from wandapp.allocation import bounds, counted, error_sparsities, owl_sparsities
from wandapp.config import PruneConfig
from wandapp.errors import Interrupted, WandappError
from wandapp.job import prune_checkpoint
from wandapp.methods.sparsegpt import block_zeros
from wandapp.models import load_model
from wandapp.pattern import SparsityPattern
from wandapp.pipeline import prune
from wandapp.verify import verify_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")[0]


def tokens(samples: int = 4):
    return torch.randint(0, 250, (samples, 24), generator=torch.Generator().manual_seed(0))


def zeros_by_map(model) -> dict[tuple[int, str], int]:
    return {
        (index, name): int((matrix.weight == 0).sum())
        for index, block in enumerate(oracle.decoder_blocks(model))
        for name, matrix in oracle.matrices(block).items()
    }


def weights_of(model) -> int:
    return sum(m.weight.numel() for block in oracle.decoder_blocks(model) for m in oracle.matrices(block).values())


sparsities = st.floats(0.01, 0.99)


@settings(deadline=None, max_examples=60)
@given(
    target=sparsities,
    sizes=st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=4), min_size=1, max_size=6),
    spread=st.floats(0.01, 0.5),
    data=st.data(),
)
def test_zeros_are_exact_in_all_and_near_each_blocks_share(target, sizes, spread, data):
    weights = [sum(maps) for maps in sizes]
    ratios = data.draw(st.lists(st.floats(0, 0.2), min_size=len(sizes), max_size=len(sizes)))
    errors = [(math.log(0.001 + r), math.log(0.001 + r) + 0.1 + 20 * r) for r in ratios]
    named = [{f"{i}.{j}": size for j, size in enumerate(maps)} for i, maps in enumerate(sizes)]
    for found, widest in (
        (owl_sparsities(ratios, weights, target, spread), 2 * spread),
        (error_sparsities(errors, weights, target, spread), spread),
    ):
        low, high = bounds(target, widest)
        assert all(low - 1e-12 <= s <= high + 1e-12 for s in found)
        pattern = counted(target, named, found)
        assert sum(pattern.zeros_by_map.values()) == int(target * sum(weights))
        for block, sparsity in zip(named, found, strict=True):
            for name, size in block.items():
                assert abs(pattern.zeros_by_map[name] - size * sparsity) <= 1 + 1e-6 * size


def test_owl_by_hand():
    """d = 0, 1/3, 1; mean 4/9; 0.6 - 0.16 (d - 4/9)."""
    found = owl_sparsities([0.01, 0.02, 0.04], [10, 10, 10], 0.6, 0.08)
    assert found == pytest.approx([0.6 + 0.16 * 4 / 9, 0.6 + 0.16 * 1 / 9, 0.6 - 0.16 * 5 / 9])


def test_owl_counts_large_blocks_more_and_equal_blocks_alike():
    found = owl_sparsities([0.01, 0.04], [30, 10], 0.5, 0.1)  # d = 0, 1; weighted mean 1/4
    assert found == pytest.approx([0.55, 0.35])
    assert owl_sparsities([0.02, 0.02], [30, 10], 0.5, 0.1) == pytest.approx([0.5, 0.5])


def test_least_error_is_found():
    """Against every triple of sparsities on a fine grid that keeps the total; the second block has twice the weights."""
    target, spread, weights = 0.6, 0.1, [1, 2, 1]
    logs = [(-6.0, -3.0), (-5.0, -4.5), (-7.0, -6.2)]
    low, high = bounds(target, spread)

    def total(sparsities):
        return sum(math.exp(a + (b - a) * (s - low) / (high - low)) for (a, b), s in zip(logs, sparsities, strict=True))

    found = error_sparsities(logs, weights, target, spread)
    assert sum(s * w for s, w in zip(found, weights, strict=True)) == pytest.approx(target * 4)
    grid = [low + (high - low) * i / 200 for i in range(201)]
    best = min(
        total((first, second, third))
        for first, second in itertools.product(grid, grid)
        if low <= (third := 4 * target - first - 2 * second) <= high
    )
    assert total(found) <= best + 1e-12


def test_outliers_are_counted_over_all_maps_of_the_dense_block(llama):
    """From the equation in float64, on the inputs of the dense model; the report holds what the formula makes of them."""
    options = dict(method="wanda", sparsity=0.6, allocate="owl", owl_outlier=3.0, allocate_spread=0.1)
    reference, ratios = oracle.float64_copy(llama), []
    for block in oracle.decoder_blocks(reference):
        norms = oracle.column_norms(oracle.layer_inputs(block, oracle.block_calls(reference, block, tokens())))
        scores = torch.cat([(m.weight.abs() * norms[n]).flatten() for n, m in oracle.matrices(block).items()])
        ratios.append((scores > 3.0 * scores.mean()).double().mean().item())
    report = prune(llama, calibration=tokens(), **options)
    expected = owl_sparsities(ratios, [1, 1, 1], 0.6, 0.1)
    assert list(report.allocation.values()) == pytest.approx(expected, abs=2e-3)
    assert max(expected) - min(expected) == pytest.approx(0.2)


def test_column_blocks_of_sparsegpt_share_the_counted_zeros():
    pattern, parts = SparsityPattern(0.5, exact_zeros=1001), [slice(0, 128), slice(128, 256), slice(256, 320)]
    shares = [block_zeros((7, 320), part, pattern) for part in parts]
    assert sum(shares) == 1001
    assert shares == pytest.approx([1001 * 128 / 320, 1001 * 128 / 320, 1001 * 64 / 320], abs=1)


@pytest.mark.parametrize(
    "method, allocate",
    [*((name, "owl") for name in ("magnitude", "sparsegpt", "admm", "wanda+ro")), ("wanda", "error")],
)
def test_every_method_removes_exactly_the_target(llama, allocate, method):
    total = weights_of(llama)
    options = dict(sparsity=0.57, allocate=allocate, ro_rounds=1, ro_samples=2)
    report = prune(llama, calibration=tokens(), method=method, **options)
    found = zeros_by_map(llama)
    assert sum(found.values()) == int(0.57 * total) == report.zeros
    for index, sparsity in enumerate(report.allocation.values()):
        for name, matrix in oracle.matrices(oracle.decoder_blocks(llama)[index]).items():
            assert abs(found[index, name] - sparsity * matrix.weight.numel()) <= 1
            if method in ("wanda", "wanda+ro"):
                removed = (matrix.weight == 0).sum(dim=1)
                assert removed.max() - removed.min() <= 1, name
    assert len(set(report.allocation.values())) > 1 and report.seconds_by_phase["allocate"] > 0
    assert verify_model(llama, "0.57", together=True).ok and not verify_model(llama, "0.57").ok


def test_a_block_that_matters_more_to_the_stream_stays_denser(llama):
    """The middle block's outputs are scaled, and its error with them."""
    found = []
    for factor in (0.25, 1.0, 4.0):
        model = copy.deepcopy(llama)
        with torch.no_grad():
            block = oracle.decoder_blocks(model)[1]
            for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
                matrix.weight.mul_(factor)
        report = prune(model, calibration=tokens(), method="wanda", sparsity=0.6, allocate="error")
        found.append(report.allocation["model.layers.1"])
    assert found[0] > found[1] > found[2]


def test_the_pass_before_pruning_is_counted_and_changes_nothing_else(llama):
    reports = {
        a: prune(copy.deepcopy(llama), calibration=tokens(), sparsity=0.5, allocate=a)
        for a in ("uniform", "owl", "error")
    }
    flops = {name: report.flops for name, report in reports.items()}
    forward = flops["uniform"] / 2  # dense and pruned; the last block's outputs are not wanted
    assert flops["owl"] - flops["uniform"] == pytest.approx(forward, rel=0.3)
    assert flops["error"] - flops["owl"] == pytest.approx(2 * forward, rel=0.3)
    wide = prune(copy.deepcopy(llama), calibration=tokens(), sparsity=0.5, allocate="error", allocate_spread=1e-6)
    assert wide.blocks[0].error == pytest.approx(reports["uniform"].blocks[0].error, rel=1e-3)


def test_experts_without_tokens_and_one_sample(tiny_model):
    model = tiny_model("mixtral", num_local_experts=8, num_hidden_layers=2)[0]
    for allocate in ("owl", "error"):
        report = prune(copy.deepcopy(model), calibration=tokens(1)[:, :2], sparsity=0.6, allocate=allocate)
        assert report.zeros == int(0.6 * report.weights)


@pytest.mark.parametrize("allocate", ["owl", "error"])
def test_a_block_that_stays_dense_has_no_part_in_it(llama, allocate):
    options = dict(calibration=tokens(), sparsity=0.6, allocate=allocate)
    whole = prune(copy.deepcopy(llama), **options).allocation
    report = prune(llama, skip=(r"layers\.0\.",), **options)
    assert list(report.allocation) == ["model.layers.1", "model.layers.2"]
    assert report.zeros == int(0.6 * report.weights)
    first, second = report.allocation.values()
    assert (first + second) / 2 == pytest.approx(0.6)
    if allocate == "owl":  # of two blocks one has d = 0, the other d = 1
        assert abs(first - second) == pytest.approx(2 * 0.08)
    assert (first < second) == (whole["model.layers.1"] < whole["model.layers.2"])


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(sparsity="2:4"), "2:4 keeps as many of every group"),
        (dict(sparsity=0.5, method="wanda-cumulative"), "counts out every zero, which wanda-cumulative does not"),
    ],
)
def test_what_cannot_be_allocated_is_refused(llama, options, told):
    with pytest.raises(WandappError, match=told):
        prune(llama, calibration=tokens(), allocate="owl", **options)


@pytest.mark.parametrize("allocate", ["owl", "error"])
def test_activations_that_are_not_finite_name_the_block(llama, allocate):
    with torch.no_grad():
        oracle.decoder_blocks(llama)[1].post_attention_layernorm.weight[3] = float("nan")
    with pytest.raises(WandappError, match=r"model\.layers\.1"):
        prune(llama, calibration=tokens(), sparsity=0.5, allocate=allocate)


@pytest.mark.slow
def test_ranks_allocate_alike(llama, tmp_path):
    def work(ranks=None):
        model = copy.deepcopy(llama)
        report = prune(model, calibration=tokens(5), sparsity=0.6, allocate="error", ranks=ranks)
        return zeros_by_map(model), report.allocation

    zeros, allocation = work()
    ended = harness.run_ranks(2, work, tmp_path)
    assert [end.code for end in ended] == [0, 0], ended[0].printed
    assert ended[0].result == ended[1].result
    assert ended[0].result[1] == pytest.approx(allocation, abs=1e-4)
    assert all(abs(ended[0].result[0][name] - count) <= 2 for name, count in zeros.items())


def test_stopped_streamed_resumed_and_verified(llama, tiny_tokenizer, tmp_path, monkeypatch, capfd):
    """The same bits as without a stop; `wandapp verify` counts all maps together, of the checkpoint and packed."""
    from wandapp import cli

    save_pruned(llama, tiny_tokenizer(), tmp_path / "dense", files={})
    save_file({"tokens": tokens()}, tmp_path / "tokens.safetensors")
    paths = dict(model=str(tmp_path / "dense"), calibration=str(tmp_path / "tokens.safetensors"))
    config = PruneConfig(**paths, out=str(tmp_path / "out"), sparsity=0.6, allocate="owl")

    def stop(progress):
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        prune_checkpoint(config, on_progress=stop)
    report = prune_checkpoint(config.model_copy(update={"stream": True}), resume=True)
    model, tokenizer = load_model(paths["model"])
    assert prune(model, tokenizer, config=config).allocation == report.allocation
    for got, expected in zip(load_model(str(tmp_path / "out")).model.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected)
    assert json.loads((tmp_path / "out/wandapp/report.json").read_text())["allocation"] == report.allocation

    def call(*arguments) -> tuple[int, dict]:
        monkeypatch.setattr(sys, "argv", ["wandapp", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, json.loads(capfd.readouterr().out.splitlines()[-1])

    assert call("pack", tmp_path / "out", tmp_path / "packed")[0] == 0
    for folder in ("out", "packed"):
        code, found = call("verify", tmp_path / folder, "--sparsity", "0.6")
        assert code == 0 and found["ok"] and found["sparsity"] == pytest.approx(0.6, abs=1e-4)
        code, found = call("verify", tmp_path / folder, "--sparsity", "0.61")
        assert code == 1 and "all 21 linear maps together" in found["first_offence"]
