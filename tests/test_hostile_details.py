"""Hostile files whose fault is a detail: a name twice, a number that is none, a pipe that nobody fills, a link to a file.

As in test_hostile_input.py: exit code 2, one sentence, nothing written, no traceback, soon and without much memory.
"""

import json
import os
import struct
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from hostile import (
    BY_RECIPE,
    PRUNE,
    Q_PROJ,
    check_refusal,
    config,
    copy_of,
    folder_instead,
    map_to,
    recipe,
    tensors,
    write,
)
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hostile_files import GGUF, RESUME, STREAM, calibrated, edited_header, interrupted, pipe

EVAL = "eval tiny --text words.txt --seq-len 16"
BLOCK = "out.partial/model-00001-of-00004.safetensors"
NORM, FIRST_Q_PROJ = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1], "long_factor": []}
TWO_NAMES = tensors(lambda weights: weights.update({Q_PROJ.removeprefix("model."): weights[Q_PROJ].clone()}))


def raw_field(name: str, text: str):
    """config.json with `text`, as it stands, for the value of a field."""

    def damage() -> None:
        config(**{name: "@"})()
        path = Path("tiny/config.json")
        path.write_text(path.read_text().replace('"@"', text))

    return damage


def said_twice(path: str, addition: str):
    """A JSON file that begins with one member more."""
    return lambda: Path(path).write_text("{" + addition + ", " + Path(path).read_text().lstrip()[1:])


def tokenizer(pre_tokenizer: dict | None):
    """One that splits by `pre_tokenizer` and knows no word, nor what to do with an unknown one."""
    model = {"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "[UNK]"}
    fields = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": pre_tokenizer}
    return write("tiny/tokenizer.json", json.dumps(fields))


def gguf_number(field: str, value: int):
    """A good .gguf of three blocks of 64 channels, of which one field says another number."""

    def damage() -> None:
        content = Path("good.gguf").read_bytes()
        place = content.index(field.encode()) + len(field) + 4
        Path("bad.gguf").write_bytes(content[:place] + struct.pack("<I", value) + content[place + 4 :])

    return damage


def parquet_of(names: list[str], *columns):
    return lambda: parquet.write_table(pyarrow.Table.from_arrays(list(columns), names=names), "bad.parquet")


def endless_text() -> None:
    """A file of 2 TiB that takes no room on the disk."""
    Path("bad.txt").write_text("words and more words\n" * 60_000)
    os.truncate("bad.txt", 1 << 41)


def linked_lock() -> None:
    """Somebody's file behind the lock of OUT.partial."""
    os.makedirs("out.partial/wandapp")
    Path("precious").write_text("years of work")
    os.symlink("../../precious", "out.partial/wandapp/lock")


def finished_block(edit, **report):
    """A run stopped after one block, whose tensors and whose report are then edited."""

    def damage() -> None:
        interrupted()()
        with safe_open(BLOCK, "pt") as file:
            metadata = file.metadata()
        weights = load_file(BLOCK)
        edit(weights)
        save_file(weights, BLOCK, metadata | {"block": json.dumps(json.loads(metadata["block"]) | report)})

    return damage


WEIGHTS = {
    "two tensors for one weight": (TWO_NAMES, PRUNE, "are both the model's"),
    "two tensors for one weight, streamed": (TWO_NAMES, STREAM, "are both the model's"),
    "a name of a million characters": (
        edited_header(lambda t: t.update({"x" * 1_000_000: t.pop(Q_PROJ)})),
        PRUNE,
        "1 to 300 characters",
    ),
    "weights of 64 bits": (config(dtype="float64"), PRUNE, "give --dtype float32"),
    "an index with a name of 5000 characters": (map_to("a" * 5000 + ".safetensors"), PRUNE, "no file of this folder"),
    "an index that contradicts itself": (
        lambda: (map_to("one.safetensors")(), said_twice("tiny/model.safetensors.index.json", '"weight_map": {}')()),
        PRUNE,
        "'weight_map' twice",
    ),
}
CONFIGS = {
    "a config that contradicts itself": (
        said_twice("tiny/config.json", '"hidden_size": 32'),
        PRUNE,
        "'hidden_size' twice",
    ),
    "no positions": (config(max_position_embeddings=0), PRUNE, "max_position_embeddings is 0"),
    "a window of -1": (config(model_type="mistral", sliding_window=-1), PRUNE, "sliding_window is -1"),
    "an infinite epsilon": (raw_field("rms_norm_eps", "1e400"), PRUNE, "rms_norm_eps is inf"),
    "a rotary base of NaN": (raw_field("rope_theta", "NaN"), PRUNE, "rope_theta is nan"),
    "a rotary base below zero": (
        config(rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        PRUNE,
        "is NaN; check what config.json says of positions",
    ),
    "rotary factors that do not fit": (config(rope_parameters=LONGROPE), PRUNE, "the model cannot run"),
    "rotary factors that do not fit, evaluated": (config(rope_parameters=LONGROPE), EVAL, "the model cannot run"),
}
TOKENIZERS = {
    "a tokenizer with a bad expression": (
        tokenizer({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}),
        PRUNE,
        "the tokenizer cannot be loaded",
    ),
    "a tokenizer that lacks its unknown word": (tokenizer(None), PRUNE, "the tokenizer cannot read this text"),
    "a longest text in words": (
        write(
            "tiny/tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "long"}'
        ),
        PRUNE,
        "the tokenizer cannot read this text",
    ),
    "a tokenizer's config that is a folder": (folder_instead("tiny/tokenizer_config.json"), PRUNE, "a folder, where"),
}
TEXTS = {
    "a text of 2 TiB": (endless_text, calibrated("bad.txt"), "of which memory takes"),
    "a text from nothing but zeros": (
        lambda: (write("bad.txt", "")(), os.truncate("bad.txt", 1 << 41)),
        calibrated("bad.txt"),
        "NUL character at 0",
    ),
    "ids from a pipe, safetensors": (
        pipe("bad.safetensors"),
        calibrated("bad.safetensors"),
        "neither a file nor a folder",
    ),
    "a .parquet with the column twice": (
        parquet_of(["text", "text"], pyarrow.array(["a"]), pyarrow.array(["b"])),
        calibrated("bad.parquet"),
        "two columns are named 'text'",
    ),
    "a .parquet of text that is not UTF-8": (
        parquet_of(["text"], pyarrow.array([b"\xff\xfe" * 50], pyarrow.binary()).view(pyarrow.string())),
        calibrated("bad.parquet"),
        "not UTF-8",
    ),
}
RECIPES = {
    "true for a number": (recipe("samples: true\n"), BY_RECIPE, "samples: must not be true or false"),
    "a thousand refiners": (recipe(f"method: wanda{'+ro' * 1000}\n"), BY_RECIPE, "8 are the most"),
    "a device beyond 64 bits": (recipe(f"device: cuda:{2**70}\n"), BY_RECIPE, "device: must be"),
    "a word tagged as a float": (recipe("samples: !!float x\n"), BY_RECIPE, "not valid YAML"),
    "a date that is none": (recipe("method: !!timestamp 99999-99-99\n"), BY_RECIPE, "not valid YAML"),
    "a recipe from a pipe": (pipe("recipe.yaml"), BY_RECIPE, "neither a file nor a folder"),
    "a sweep from a pipe": (pipe("sweep.yaml"), "sweep sweep.yaml", "neither a file nor a folder"),
    "gradients kept under a NUL": (recipe('gblm_cache: "a\\0b"\n'), BY_RECIPE, "gblm_cache"),
}
GGUFS = {
    **{
        f"a .gguf of a billion blocks{option}": (
            gguf_number("llama.block_count", 10**9),
            f"{GGUF}{option}",
            "bad.gguf: says that it has 1000000000 blocks, and holds 3",
        )
        for option in ("", " --stream", " --plan")
    },
    "a .gguf of one block less": (gguf_number("llama.block_count", 2), GGUF, "2 blocks, and holds 3"),
    "a .gguf of other sizes": (gguf_number("llama.embedding_length", 128), GGUF, "not of the shapes"),
    "a .gguf of other sizes, streamed": (gguf_number("llama.embedding_length", 128), f"{GGUF} --stream", "bad.gguf"),
}
RUNS = {
    "a lock that is a link": (linked_lock, PRUNE, "out.partial: cannot be made"),
    "a run's manifest from a pipe": (
        lambda: (interrupted()(), pipe("out.partial/wandapp/run.json")()),
        RESUME,
        "run.json: neither a file nor a folder",
    ),
    "a finished block from a pipe": (
        lambda: (interrupted()(), pipe(BLOCK)()),
        RESUME,
        "model-00001-of-00004.safetensors: neither a file nor a folder",
    ),
}
FINISHED = {
    name: (finished_block(edit), RESUME, said)
    for name, edit, said in (
        ("a finished block that lacks a tensor", lambda w: w.pop(NORM), "not the tensors that the run kept there"),
        (
            "a finished block with a tensor more",
            lambda w: w.update(ghost=torch.ones(1)),
            "not the tensors that the run kept",
        ),
        (
            "a finished block of another type",
            lambda w: w.update({NORM: w[NORM].half()}),
            "not the tensors that the run kept",
        ),
        (
            "a finished block of NaN",
            lambda w: w[NORM].fill_(torch.nan),
            "is NaN or Inf; delete it to prune its block again",
        ),
        (
            "a finished block that is dense",
            lambda w: w[FIRST_Q_PROJ].fill_(1.0),
            "0 zeros in a block that an interrupted run",
        ),
    )
} | {
    "a finished block whose report is of other types": (
        finished_block(lambda w: None, error="small", warnings=7),
        RESUME,
        "not written by wandapp",
    ),
}
OTHERS = {
    "unpacking without a config": (lambda: os.remove("packed/config.json"), "unpack packed out", "packed/config.json"),
    "a report of other types": (
        write("pruned/wandapp/report.json", '{"blocks": 5, "seconds": "x"}'),
        "report pruned --out r.html",
        "pruned: results that this wandapp cannot show",
    ),
    "results from a pipe": (pipe("bad.json"), "report bad.json --out r.html", "a pipe or a device"),
    "recovering NaN weights": (
        tensors(lambda weights: weights[Q_PROJ].fill_(torch.nan), "pruned/model.safetensors"),
        "recover pruned --out out",
        "is NaN or Inf",
    ),
    "a layer beyond memory": (lambda: None, f"bench kernels --shape {10**9}x{10**9}", "1073741824 are the most"),
}
CASES = FINISHED | OTHERS | WEIGHTS | CONFIGS | TOKENIZERS | TEXTS | RECIPES | GGUFS | RUNS


@pytest.mark.parametrize("case", CASES)
def test_a_detail_gets_one_sentence_and_nothing_is_written(case, originals, tmp_path, monkeypatch, capfd):
    check_refusal(*CASES[case], copy_of(originals, tmp_path, monkeypatch), monkeypatch, capfd)


def exit_code(command: str, monkeypatch) -> int:
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_verify_fails_on_a_packed_weight_that_is_no_number(originals, tmp_path, monkeypatch, capfd):
    copy_of(originals, tmp_path, monkeypatch)
    values = "model.layers.0.self_attn.q_proj.values"
    path = next(path for path in Path("packed").glob("*.safetensors") if values in load_file(path))
    tensors(lambda weights: weights[values][7].mul_(torch.inf), str(path))()
    assert exit_code("verify packed", monkeypatch) == 1
    assert "model.layers.0.self_attn.q_proj: row 7, column" in capfd.readouterr().out


def test_a_run_that_meets_bad_weights_says_what_it_keeps(originals, tmp_path, monkeypatch, capfd):
    """A streamed block is read when its turn has come: those before it are pruned by then, and stay."""
    copy_of(originals, tmp_path, monkeypatch)
    tensors(lambda weights: weights["model.layers.2.mlp.up_proj.weight"].fill_(torch.nan))()
    assert exit_code(STREAM, monkeypatch) == 2 and not Path("out").exists()
    assert "finished blocks kept in out.partial for --resume: 2" in capfd.readouterr().err.splitlines()[-1]
