"""`wandapp bench kernels`: which shapes it takes, that every op and backend is in its figures, and what it refuses."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from wandapp import save_pruned
from wandapp.bench_kernel_cases import TORCH, Case
from wandapp.bench_kernels import milliseconds
from wandapp.errors import WandappError
from wandapp.kernels import FUNCTIONS
from wandapp.layer_shapes import MODELS, layer_shapes


def call(monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `wandapp bench kernels`, in this process."""
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", "bench", "kernels", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


def test_shapes_of_llama_7b_and_of_grouped_queries():
    assert list(layer_shapes("llama-7b")) == [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert layer_shapes("Llama-3-8B") == {
        (4096, 4096): ["q_proj", "o_proj"],
        (1024, 4096): ["k_proj", "v_proj"],
        (14336, 4096): ["gate_proj", "up_proj"],
        (4096, 14336): ["down_proj"],
    }
    assert all(d.heads % d.kv_heads == 0 for d in MODELS.values())


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", {(64, 64): ["q_proj", "o_proj"], (32, 64): ["k_proj", "v_proj"],
                   (128, 64): ["gate_proj", "up_proj"], (64, 128): ["down_proj"]}),
        ("gpt2", {(192, 64): ["c_attn"], (64, 64): ["c_proj"], (128, 64): ["c_fc"], (64, 128): ["c_proj"]}),
    ],
)  # fmt: skip
def test_shapes_of_a_folder_are_those_of_its_model(family, expected, tiny_model, tmp_path):
    model, _ = tiny_model(family)
    save_pruned(model, None, tmp_path / "model", files={})
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()  # the config is enough
    assert layer_shapes(str(tmp_path / "model")) == expected


def test_unknown_model_gets_a_proposal():
    with pytest.raises(WandappError, match="did you mean 'llama-7b'"):
        layer_shapes("lama-7b")


def test_every_op_and_backend_is_timed_beside_the_copy_and_torch(monkeypatch, capfd, tmp_path):
    out = tmp_path / "figures.json"
    code, stdout, stderr = call(monkeypatch, capfd, "--shape", "24x64", "--rounds", 1, "--json", "--out", out)
    assert code == 0, stderr
    result = json.loads(stdout)
    assert json.loads(out.read_text()) == result and result["copy_gb_s"] > 0 and result["left_out"] == []
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        assert rows[0]["op"] == "copy_ of W" and all(row["q25_ms"] <= row["median_ms"] <= row["q75_ms"] for row in rows)
        timed = {row["op"].split(" ")[0].rstrip(",") for row in rows if row["backend"].startswith("cpu")}
        assert timed >= set(FUNCTIONS) - {"sparse_linear"} and "x" in timed  # x W^T
        assert {row["op"] for row in rows if row["backend"] == TORCH} >= {"prune_nm_ 2:4", "x W^T, 1 token", "rmsprop_"}
    assert "ceiling" in stderr and "24 x 64 bfloat16" in stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--only", "selecton"), "did you mean 'selection'"),
        (("--shape", "11008"), "OUTxIN"),
        (("--shape", "8x12"), "divisible by 8"),
        (("--backend", "cud"), "did you mean 'cuda'"),
        (("llama-7b", "--shape", "8x8"), "not both"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(monkeypatch, capfd, arguments, message):
    code, stdout, stderr = call(monkeypatch, capfd, *arguments)
    assert (code, stdout) == (2, "") and message in stderr and "Traceback" not in stderr


def test_an_in_place_op_gets_its_input_back_before_every_turn_and_outside_the_clock():
    happened = []
    case = Case("op", "cpu", 1.0, lambda: happened.append("run"), lambda: happened.append("restore"))
    milliseconds([case], 3, torch.device("cpu"))
    assert happened == ["restore", "run"] * 4


def test_the_gpu_benchmark_says_that_there_is_no_gpu(monkeypatch, capsys, tmp_path):
    path = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(path), "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 1 and "no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
