"""The command line from end to end, on a tiny checkpoint: what it writes, what it prints, how it exits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from wandapp import SparsityPattern, load_model, save_pruned

CALIBRATION = ("--calibration", "pydoc", "--samples", "4", "--seq-len", "32")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    save_pruned(tiny_model("llama")[0], tiny_tokenizer(), folder, files={})
    return folder


def wandapp(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """The installed command, in its own process, without a terminal or stdin."""
    command = [str(Path(sys.executable).with_name("wandapp")), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,  # a busy machine takes minutes to import torch
    )


def call(monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the entry point, in this process."""
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


@pytest.fixture(scope="module")
def pruned(checkpoint) -> Path:
    """A folder written by the installed command; JSON mode."""
    out = checkpoint.parent / "pruned"
    run = wandapp("prune", checkpoint, "--out", out, *CALIBRATION, "--json")
    assert run.returncode == 0, run.stderr
    (out.parent / "stdout.txt").write_text(run.stdout)
    (out.parent / "stderr.txt").write_text(run.stderr)
    return out


def test_prune_writes_a_checkpoint_that_holds_the_pattern(pruned):
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "README.md", "wandapp"} <= {
        p.name for p in pruned.iterdir()
    }
    pattern = SparsityPattern.parse("2:4")
    model, tokenizer = load_model(pruned)
    assert tokenizer is not None
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            assert pattern.holds(linear.weight)
            zeros = linear.weight == 0
            assert not torch.signbit(linear.weight[zeros]).any()
    assert not (model.lm_head.weight == 0).any()


def test_json_is_the_only_line_of_stdout(pruned):
    lines = (pruned.parent / "stdout.txt").read_text().splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert (result["sparsity"], result["out"]) == (0.5, str(pruned))
    assert result == json.loads((pruned / "wandapp" / "report.json").read_text()) | {
        "model": result["model"],
        "out": result["out"],
    }


def test_progress_without_a_terminal_is_plain_lines(pruned):
    progress = (pruned.parent / "stderr.txt").read_text()
    assert "block 1/3" in progress and "block 3/3" in progress
    assert "\x1b" not in progress and "\r" not in progress


def test_recipe_repeats_the_run(pruned, monkeypatch, capfd):
    again = pruned.parent / "again"
    recipe = pruned / "wandapp" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["sparsity"] == "2:4"
    code, _, _ = call(monkeypatch, capfd, "prune", "--config", recipe, "--out", again)
    assert code == 0
    files = sorted(path.name for path in pruned.glob("model*"))
    assert len(files) == 3 + 2 and files == sorted(path.name for path in again.glob("model*"))
    assert all((again / name).read_bytes() == (pruned / name).read_bytes() for name in files)


def test_flags_win_over_the_recipe(checkpoint, tmp_path, monkeypatch, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 2:4\nmethod: wanda\ncalibration: pydoc\nsamples: 2\nseq_len: 16\n")
    out = tmp_path / "out"
    arguments = ("prune", checkpoint, "--config", recipe, "--sparsity", "1:4", "--skip", "down_proj", "--out", out)
    code, _, errors = call(monkeypatch, capfd, *arguments)
    assert code == 0, errors
    model, _ = load_model(out)
    assert SparsityPattern.parse("1:4").holds(model.model.layers[0].self_attn.q_proj.weight)
    assert not (model.model.layers[0].mlp.down_proj.weight == 0).any()


@pytest.mark.parametrize(
    ("method", "sparsity"), [("magnitude", "0.5"), ("wanda", "50%"), ("sparsegpt", "4:8"), ("wanda++", "2:4")]
)
def test_methods(checkpoint, tmp_path, monkeypatch, capfd, method, sparsity):
    out = tmp_path / "out"
    flags = ("--method", method, "--sparsity", sparsity, "--ro-rounds", "1", "--ro-samples", "2")
    code, text, errors = call(monkeypatch, capfd, "prune", checkpoint, "--out", out, *CALIBRATION, *flags)
    assert code == 0, errors
    assert "0.5" in text
    assert ("--ro-rounds is an option of ro" in errors) == (method != "wanda++")
    assert call(monkeypatch, capfd, "verify", out)[0] == 0


def test_verify_passes_and_says_so(pruned, monkeypatch, capfd):
    code, text, _ = call(monkeypatch, capfd, "verify", pruned, "--sparsity", "2:4")
    assert code == 0 and text == "ok: 21 linear maps hold 2:4 (sparsity 0.5000)\n"


def test_verify_fails_with_exit_code_1_and_the_first_offence(pruned, tmp_path, monkeypatch, capfd):
    model, _ = load_model(pruned)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7, 8:12] = 1.0
    save_pruned(model, None, tmp_path / "broken", files={})
    code, text, _ = call(monkeypatch, capfd, "verify", tmp_path / "broken", "--sparsity", "2:4", "--json")
    assert code == 1
    offence = json.loads(text)["first_offence"]
    assert "model.layers.1.mlp.up_proj" in offence and "row 7" in offence and "column" in offence and "8" in offence


def test_verify_fails_on_the_dense_model(checkpoint):
    run = wandapp("verify", checkpoint, "--sparsity", "2:4")
    assert run.returncode == 1 and "model.layers.0." in run.stdout


def test_what_is_skipped_is_shown_and_verified_as_the_card_says(checkpoint, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    arguments = ("prune", checkpoint, "--out", out, "--method", "magnitude", "--skip", "q_proj", *CALIBRATION)
    code, text, errors = call(monkeypatch, capfd, *arguments)
    assert code == 0, errors
    assert re.search(r"kept dense +3 linear maps, 11.1% of the blocks' weights, of which 44.4% are zero", text), text
    assert "`wandapp verify .`" in (out / "README.md").read_text()
    for more in ((), ("--sparsity", "2:4")):
        code, text, _ = call(monkeypatch, capfd, "verify", out, *more)
        assert code == 0 and "18 linear maps hold 2:4, apart from what --skip q_proj leaves dense" in text


def test_a_recipe_s_mistake_names_the_file_and_a_flag_s_does_not(checkpoint, tmp_path, monkeypatch, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\nallocate: error\nsparsity: 0.6\n")
    code, _, errors = call(monkeypatch, capfd, "prune", "--config", recipe, "--allocate-spread", "3", "--plan")
    assert code == 2 and "recipe.yaml" not in errors and "allocate_spread" in errors
    recipe.write_text("methud: wanda\n")
    code, _, errors = call(monkeypatch, capfd, "prune", "--config", recipe, "--plan")
    assert code == 2 and f"{recipe}: option 'methud' does not exist" in errors


def test_more_tokens_than_positions_are_refused(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, capfd):
    save_pruned(tiny_model("gpt2")[0], tiny_tokenizer(), tmp_path / "gpt2", files={})
    code, _, errors = call(monkeypatch, capfd, "generate", tmp_path / "gpt2", "hello", "--max-new-tokens", "600")
    assert (
        code == 2
        and "the model has 512 positions, got a prompt of 5 tokens and 600 new ones; use --max-new-tokens 507" in errors
    )


def test_eval_states_every_circumstance(pruned, monkeypatch, capfd):
    arguments = ("eval", pruned, "--text", "pydoc", "--seq-len", "32", "--windows", "3", "--json")
    code, text, errors = call(monkeypatch, capfd, *arguments)
    assert code == 0, errors
    result = json.loads(text)
    assert result["perplexity"] > 1 and (result["windows"], result["seq_len"]) == (3, 32)
    assert {"split", "tokenizer", "dtype", "text_sha256"} <= result.keys()


def test_generate_prints_prompt_and_continuation(checkpoint, monkeypatch, capfd):
    code, text, _ = call(monkeypatch, capfd, "generate", checkpoint, "The sea", "--max-new-tokens", "4")
    assert code == 0 and text.startswith("The sea")


def test_doctor_names_a_backend_and_a_reason_for_every_kernel(monkeypatch, capfd):
    from wandapp.kernels import FUNCTIONS

    code, text, _ = call(monkeypatch, capfd, "doctor")
    assert code == 0
    assert all(name in text for name in ("torch", "transformers", "nvcc", "gpu", "instructions", *FUNCTIONS))
    code, text, _ = call(monkeypatch, capfd, "doctor", "--json")
    found = json.loads(text)
    assert found["processor"]["threads"] >= 1
    assert {row["function"] for row in found["backends"]} == set(FUNCTIONS)
    assert all(row["reason"] for row in found["backends"])


def test_module_and_script_are_the_same_command():
    script = wandapp("--version")
    module = subprocess.run([sys.executable, "-m", "wandapp", "--version"], capture_output=True, text=True, timeout=60)
    assert script.stdout == module.stdout != ""
    assert script.returncode == module.returncode == 0


def test_help_lists_every_option():
    from wandapp import PruneConfig

    text = wandapp("prune", "--help", COLUMNS="200").stdout
    missing = [
        name for name in PruneConfig.model_fields if f"--{name.replace('_', '-')}" not in text and name != "model"
    ]
    assert not missing


def test_interrupt_exits_with_3_and_leaves_no_output(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [str(Path(sys.executable).with_name("wandapp")), "prune", str(checkpoint), "--out", str(out)]
    run = subprocess.Popen(
        [*command, "--calibration", "self", "--samples", "512", "--seq-len", "512"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stderr.readline().startswith("loading")
    time.sleep(3)  # past the imports, inside the work
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 3, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
