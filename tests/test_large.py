"""A checkpoint of 3 GiB streamed: how much memory it takes, and how much the plan said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from wandapp.shards import write_index, write_shard

HIDDEN, FFN, VOCABULARY, BLOCKS = 4096, 11008, 32000, 7
MB = 1 << 20


def weights(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def make_checkpoint(folder: Path) -> tuple[int, int]:
    """3.1 GiB of bf16 Llama blocks, all of the same random weights; bytes of one block and of everything outside."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator, one = torch.Generator().manual_seed(0), torch.ones(HIDDEN, dtype=torch.bfloat16)
    wide, tall = weights(HIDDEN, FFN, generator), weights(FFN, HIDDEN, generator)
    block = {f"self_attn.{name}_proj.weight": tall[:HIDDEN] for name in "qkvo"}
    block |= {"mlp.gate_proj.weight": tall, "mlp.up_proj.weight": tall, "mlp.down_proj.weight": wide}
    block |= {"input_layernorm.weight": one, "post_attention_layernorm.weight": one}
    paths = [folder / f"part-{index}.safetensors" for index in range(BLOCKS + 1)]
    for index, path in enumerate(paths[:-1]):
        block_bytes = write_shard(path, {f"model.layers.{index}.{k}": v for k, v in block.items()}, {"format": "pt"})
    outer = {"model.embed_tokens.weight": weights(VOCABULARY, HIDDEN, generator), "model.norm.weight": one}
    outer["lm_head.weight"] = outer["model.embed_tokens.weight"]
    outer_bytes = write_shard(paths[-1], outer, {"format": "pt"})
    write_index(folder, paths)
    return block_bytes, outer_bytes


def wandapp(*arguments: str, **environment) -> tuple[dict, int]:
    """(JSON result, peak resident bytes of the process) of one command."""
    code = """
from wandapp.cli import main
try:
    main()
finally:
    print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    command = [sys.executable, "-c", code, *arguments, "--json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    *_, result, peak = done.stdout.splitlines()
    return json.loads(result), int(peak)


def check_plan(folder: Path, tokens: Path, out: Path, *options: str) -> tuple[dict, int]:
    arguments = ["prune", str(folder), "--calibration", str(tokens), "--out", str(out), *options]
    plan, _ = wandapp(*arguments, "--plan")
    result, peak = wandapp(*arguments)
    assert peak == pytest.approx(plan["peak_bytes"], rel=0.15), plan["parts"]
    return result, peak


@pytest.mark.slow
def test_a_large_checkpoint_takes_the_memory_of_two_blocks(tmp_path):
    block_bytes, outer_bytes = make_checkpoint(tmp_path / "dense")
    total = sum(path.stat().st_size for path in (tmp_path / "dense").iterdir())
    assert total >= 3 << 30
    save_file({"tokens": torch.randint(0, VOCABULARY, (2, 16))}, tmp_path / "tokens.safetensors")
    result, peak = check_plan(tmp_path / "dense", tmp_path / "tokens.safetensors", tmp_path / "out", "--stream")
    hidden_bytes = 2 * 16 * HIDDEN * 2
    assert peak <= 2 * block_bytes + hidden_bytes + outer_bytes + 400 * MB
    assert result["sparsity"] == 0.5
    for folder in ("dense", "out"):
        for path in (tmp_path / folder).glob("*.safetensors"):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wanda", "wanda++"])
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_plan_of_a_tiny_checkpoint(method, stream, tiny_model, tmp_path):
    """Nothing but libraries: their constant is what is tested."""
    from wandapp import save_pruned

    save_pruned(tiny_model("llama")[0], None, tmp_path / "dense", files={})
    save_file({"tokens": torch.randint(0, 300, (8, 32))}, tmp_path / "tokens.safetensors")
    options = ("--method", method, "--ro-rounds", "1", stream)
    check_plan(tmp_path / "dense", tmp_path / "tokens.safetensors", tmp_path / "out", *options)


# Plans and runs of one model, each in a fork of a process that has everything imported: that is most of a start's time.
PLANS = """
import json, os, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import wandapp.job, wandapp.plan, wandapp.kernels.select.cpu, wandapp.kernels.compensate.cpu  # before the fork
from wandapp.config import PruneConfig
from wandapp.memory import peak_resident_bytes

def forked(work):
    reading, writing = os.pipe()
    if not os.fork():
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.wait()
    return json.loads(text)

def run():
    wandapp.job.prune_checkpoint(config)
    return peak_resident_bytes()

task = json.loads(sys.argv[1])
for method in task["methods"]:
    for stream in (False, True):
        config = PruneConfig(**task["recipe"], method=method, stream=stream)
        planned, peak = forked(lambda: wandapp.plan.plan_run(config).peak_bytes), forked(run)
        print(json.dumps([method, stream, planned, peak]), flush=True)
        shutil.rmtree(task["recipe"]["out"])
"""
METHODS = ["magnitude", "wanda", "sparsegpt", "gblm", "rgs", "wanda++", "sparsegpt+ro", "wanda+reconstruct"]


@pytest.mark.slow
def test_plan_of_every_method_on_blocks_of_50_mb(tmp_path, tiny_model):
    from wandapp import save_pruned

    sizes = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=8000)
    save_pruned(tiny_model("llama", **sizes)[0], None, tmp_path / "dense", files={})
    save_file({"tokens": torch.randint(0, 8000, (8, 32))}, tmp_path / "tokens.safetensors")
    recipe = {"model": tmp_path / "dense", "out": tmp_path / "out", "calibration": tmp_path / "tokens.safetensors"}
    recipe = {name: str(path) for name, path in recipe.items()}
    recipe |= {"ro_rounds": 1, "ro_samples": 2, "reconstruct_passes": 1}
    command = [sys.executable, "-c", PLANS, json.dumps({"recipe": recipe, "methods": METHODS})]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(METHODS)
    off = [line for line in lines if line[2] != pytest.approx(line[3], rel=0.15)]
    assert not off, off
