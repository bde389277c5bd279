"""`wandapp inspect`: counts and patterns against loops, in every storage; shapes that suit a GPU's libraries."""

import json
import sys

import pytest
import torch

from wandapp import WandappError, load_model, pack_checkpoint, save_pruned
from wandapp.inspection import GPU_MULTIPLES, inspect_checkpoint, not_implied
from wandapp.masked import linear_views


def tightest(weight: torch.Tensor) -> set[str]:
    """n:m by loops: the most non-zeros of any group of m consecutive inputs, where that is below m."""
    found = set()
    for m in (2, 4, 8, 16, 32):
        if weight.shape[1] % m == 0:
            groups = [row[start : start + m] for row in weight.tolist() for start in range(0, len(row), m)]
            n = max(sum(value != 0 for value in group) for group in groups)
            found |= {f"{n}:{m}"} if n < m else set()
    return found


SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("qwen3", "4:8"), ("opt", "0.5"))]


@pytest.mark.parametrize(("family", "sparsity"), [("llama", "2:4"), ("gpt2", "1:4"), *SLOW])
def test_zeros_and_patterns_are_those_of_the_weights(family, sparsity, pruned_checkpoint, tmp_path):
    model, folder = pruned_checkpoint(family, sparsity)
    weights = {view.name: view.weight for view in linear_views(model)}
    found = inspect_checkpoint(folder)
    assert [linear.name for linear in found.linears] == list(weights)
    for linear in found.linears:
        weight = weights[linear.name]
        assert (linear.shape, linear.zeros) == (tuple(weight.shape), int((weight == 0).sum()))
        assert set(linear.patterns) == tightest(weight)
    if sparsity != "0.5":
        assert sparsity in found.totals()["patterns"]
    pack_checkpoint(folder, tmp_path / "packed")
    packed = inspect_checkpoint(tmp_path / "packed")
    assert (packed.linears, packed.fused, packed.form) == (found.linears, found.fused, "packed")
    assert packed.file_bytes < found.file_bytes


def test_experts_are_seen_along_their_true_inputs(pruned_checkpoint):
    found = inspect_checkpoint(pruned_checkpoint("mixtral", "2:4")[1])
    experts = [linear for linear in found.linears if ".experts." in linear.name]
    assert {linear.shape for linear in experts} == {(128, 64), (64, 128)} and len(experts) == 3 * 4 * 3
    assert all(linear.holds_2of4 for linear in experts)
    assert any(linear.name.endswith("w1+w3") and linear.shape == (256, 64) for linear in found.fused)


def test_dense_model_holds_no_pattern_but_its_shapes_are_judged(tiny_model, tmp_path):
    save_pruned(tiny_model("llama")[0], None, tmp_path / "dense", files={})
    found = inspect_checkpoint(tmp_path / "dense")
    assert found.totals()["patterns"] == [] and all(linear.runs_on() == [] for linear in found.linears)
    assert all(linear.fits["CUTLASS 16 bit"] for linear in found.linears)


def test_fusion_can_make_a_shape_fit(pruned_checkpoint):
    """48 query rows and 8 each of key and value suit few libraries alone; together they are 64 rows, which suit three."""
    shape = dict(head_dim=8, num_attention_heads=6, num_key_value_heads=1)  # q 48 x 64, k and v 8 x 64, fused 64 x 64
    _, folder = pruned_checkpoint("qwen3", "2:4", **shape)
    found = inspect_checkpoint(folder)
    by_name = {linear.name.removeprefix("model.layers.0.self_attn."): linear for linear in found.linears + found.fused}
    assert by_name["k_proj"].runs_on() == [] and by_name["q_proj"].runs_on() == ["cuSPARSELt 16 bit"]
    fused = by_name["q_proj+k_proj+v_proj"]
    assert fused.shape == (64, 64) and fused.runs_on() == ["CUTLASS 16 bit", "cuSPARSELt 16 bit", "cuSPARSELt 8 bit"]
    totals = found.totals()
    assert (totals["linears"], totals["products_after_fusion"]) == (21, 12)
    assert totals["gpu_after_fusion"]["CUTLASS 16 bit"] == 9  # o_proj has 48 inputs, no multiple of 64
    assert set(totals["gpu"]) == set(GPU_MULTIPLES)


def test_patterns_that_follow_from_others_are_left_out():
    assert not_implied(["4:8", "2:4", "8:16", "15:32"]) == ["2:4", "15:32"]
    assert not_implied(["1:2", "2:4"]) == ["1:2"] and not_implied([]) == []


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(WandappError, match="inspect reads a local folder"):
        inspect_checkpoint(tmp_path / "none")
    with pytest.raises(WandappError, match="a model folder holds config.json"):
        inspect_checkpoint(tmp_path)


def test_command(pruned_checkpoint, monkeypatch, capfd):
    from wandapp import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["wandapp", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        return capfd.readouterr().out

    folder = pruned_checkpoint("llama", "2:4")[1]
    text = call(folder)
    assert "in all of them  2:4\n" in text and "model.layers.*.self_attn.q_proj+k_proj+v_proj" in text
    assert "model.layers.2.mlp.down_proj" in call(folder, "--layers")
    found = json.loads(call(folder, "--skip", "mlp", "--json"))
    assert found["totals"]["linears"] == 12 == len(found["linears"])
    assert load_model(folder).model is not None
