"""Hostile and broken files: exit code 2, one sentence that says where and what to do, nothing written, no traceback.

Each case makes one thing wrong in an otherwise good folder (tests/hostile.py) and runs the real entry point on it.
"""

import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from hostile import (
    BY_RECIPE,
    PRUNE,
    PYDOC,
    Q_PROJ,
    SHORT,
    array,
    check_refusal,
    config,
    copy_of,
    cut,
    fill,
    folder_instead,
    gguf,
    header,
    index,
    link,
    manifest,
    map_to,
    npy_header,
    pickled,
    recipe,
    table,
    tensors,
    twice,
    write,
)
from safetensors.torch import save_file

LOL = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
GOOD_RECIPE = "calibration: pydoc\nsamples: 2\nseq_len: 16\n"


def calibrated(name: str) -> str:
    return f"prune tiny --out out --calibration {name} {SHORT}"


# case -> (what to break, command, what the sentence must say)
WEIGHTS = {
    "weights cut in the header": (cut("tiny/model.safetensors", 1000), PRUNE, "corrupt or incomplete"),
    "weights cut in the data": (cut("tiny/model.safetensors", -1), PRUNE, "corrupt or incomplete"),
    "weights of no bytes": (write("tiny/model.safetensors", ""), PRUNE, "corrupt or incomplete"),
    "weights of text": (write("tiny/model.safetensors", "version https://git-lfs" * 9), PRUNE, "corrupt or incomplete"),
    "header of 2^60 bytes": (header("{}", 2**60), PRUNE, "corrupt or incomplete"),
    "header that is no JSON": (header("{" * 64), PRUNE, "corrupt or incomplete"),
    "header without tensors": (header("{}      "), PRUNE, "hold no tensors"),
    "header with offsets beyond the file": (
        header(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
        PRUNE,
        "corrupt or incomplete",
    ),
    "header with overlapping tensors": (
        header(json.dumps({n: {"dtype": "F32", "shape": [0], "data_offsets": [0, 4]} for n in "ab"})),
        PRUNE,
        "corrupt or incomplete",
    ),
    "header with an unknown dtype": (
        header(json.dumps({"a": {"dtype": "F7", "shape": [0], "data_offsets": [0, 0]}})),
        PRUNE,
        "corrupt or incomplete",
    ),
    "weights are a folder": (folder_instead("tiny/model.safetensors"), PRUNE, "tiny/model.safetensors"),
    "weights link to nothing": (link("tiny/model.safetensors", "gone"), PRUNE, "no such file"),
    "weights link to themselves": (link("tiny/model.safetensors", "model.safetensors"), PRUNE, "model.safetensors"),
    "a missing weight": (
        tensors(lambda weights: weights.pop(Q_PROJ)),
        PRUNE,
        f"1 weights of the model are not in the checkpoint, the first is {Q_PROJ}",
    ),
    "a weight of another shape": (
        tensors(lambda weights: weights.update({Q_PROJ: torch.zeros(64, 60)})),
        PRUNE,
        f"{Q_PROJ} has shape [64, 60], config.json asks for [64, 64]",
    ),
    "a weight of another rank": (tensors(lambda w: w.update({Q_PROJ: torch.zeros(64)})), PRUNE, "has shape [64]"),
    "integer weights": (
        tensors(lambda weights: weights.update({Q_PROJ: torch.ones(64, 64, dtype=torch.int32)})),
        PRUNE,
        Q_PROJ,
    ),
    "NaN in a linear map": (fill(Q_PROJ, float("nan")), PRUNE, Q_PROJ.removesuffix(".weight")),
    "Inf in a linear map": (fill(Q_PROJ, float("inf")), PRUNE, Q_PROJ.removesuffix(".weight")),
    "NaN in a linear map, magnitude": (
        fill(Q_PROJ, float("nan")),
        f"{PRUNE} --method magnitude --sparsity 0.5",
        Q_PROJ.removesuffix(".weight"),
    ),
    "NaN in a linear map, SparseGPT": (
        fill(Q_PROJ, float("nan")),
        f"{PRUNE} --method sparsegpt",
        Q_PROJ.removesuffix(".weight"),
    ),
    "NaN in a norm": (fill("model.layers.1.input_layernorm.weight", float("nan")), PRUNE, "model.layers.1"),
    "Inf in a norm": (fill("model.layers.2.post_attention_layernorm.weight", float("inf")), PRUNE, "model.layers.2"),
    "NaN in the embedding": (
        tensors(lambda weights: weights["model.embed_tokens.weight"].fill_(float("nan"))),
        PRUNE,
        "model.embed_tokens",
    ),
    "NaN in the head": (fill("lm_head.weight", float("nan")), PRUNE, "lm_head.weight"),
    "eval of NaN weights": (fill(Q_PROJ, float("nan")), "eval tiny --text pydoc --seq-len 16 --windows 2", "NaN"),
    "pickled weights": (pickled("tiny/pytorch_model.bin"), PRUNE, "pickled weights may run code"),
    "pickled .pt": (pickled("tiny/weights.pt"), PRUNE, "pickled weights may run code"),
    "a pickle given as the model": (pickled("bad.pt", "x"), f"prune bad.pt --out out {PYDOC}", "pickled"),
    "a pickle named safetensors": (pickled("tiny/model.safetensors"), PRUNE, "corrupt or incomplete"),
    "an index that names a pickle": (map_to("pytorch_model.bin"), PRUNE, "pytorch_model.bin"),
    "an index out of the folder": (map_to("../pruned/model.safetensors"), PRUNE, "which is no file of this folder"),
    "an index with an absolute path": (map_to("/etc/passwd"), PRUNE, "which is no file of this folder"),
    "an index with an empty name": (map_to(""), PRUNE, "which is no file of this folder"),
    "an index with a NUL": (map_to("one\0.safetensors"), PRUNE, "which is no file of this folder"),
    "an index of numbers": (map_to(7), PRUNE, "not a valid index"),
    "an index of lists": (map_to(["one.safetensors"]), PRUNE, "not a valid index"),
    "an index that names a missing file": (map_to("three.safetensors"), PRUNE, "three.safetensors"),
    "an index that names the wrong file": (
        index(lambda whole: {"weight_map": {n: "one.safetensors" for n in whole["weight_map"]}}),
        PRUNE,
        "one.safetensors",
    ),
    "an index that names a missing tensor": (
        index(lambda whole: whole["weight_map"].update(ghost="one.safetensors")),
        PRUNE,
        "ghost",
    ),
    "a tensor in two shards": (index(twice), PRUNE, "is also in"),
    "an index that is a list": (index(lambda whole: [whole]), PRUNE, "model.safetensors.index.json: not a valid JSON"),
    "an index without a map": (index(lambda whole: {"metadata": {}}), PRUNE, "not a valid index"),
    "an empty map": (index(lambda whole: {"weight_map": {}}), PRUNE, "index"),
    "an index that is no JSON": (
        write("tiny/model.safetensors.index.json", "{"),
        PRUNE,
        "model.safetensors.index.json: not valid JSON",
    ),
    "an index of deep brackets": (
        write("tiny/model.safetensors.index.json", "[" * 200_000),
        PRUNE,
        "model.safetensors.index.json: not valid JSON",
    ),
    "an index that links to itself": (
        link("tiny/model.safetensors.index.json", "model.safetensors.index.json"),
        PRUNE,
        "model.safetensors.index.json",
    ),
}
CONFIGS = {
    "no config.json": (lambda: os.remove("tiny/config.json"), PRUNE, "holds config.json"),
    "config.json of no bytes": (write("tiny/config.json", ""), PRUNE, "config.json"),
    "config.json without fields": (write("tiny/config.json", "{}"), PRUNE, "tiny"),
    "config.json that is no JSON": (write("tiny/config.json", "model_type: llama"), PRUNE, "config.json"),
    "config.json that is a list": (write("tiny/config.json", "[]"), PRUNE, "tiny"),
    "config.json that is not UTF-8": (write("tiny/config.json", b"\xff\xfe{\0"), PRUNE, "config.json"),
    "config.json of deep brackets": (write("tiny/config.json", '{"a":' + "[" * 100_000), PRUNE, "tiny"),
    "config.json of 40 MB": (write("tiny/config.json", '{"a": "' + "x" * 40_000_000 + '"}'), PRUNE, "config.json"),
    "config.json is a folder": (folder_instead("tiny/config.json"), PRUNE, "config.json"),
    "config.json links to nothing": (link("tiny/config.json", "gone"), PRUNE, "config.json"),
    "config.json links to itself": (link("tiny/config.json", "config.json"), PRUNE, "config.json"),
    "the model links to itself": (link("tiny", "tiny"), PRUNE, "tiny"),
    "an unknown architecture": (config(model_type="warp", architectures=["Warp"]), PRUNE, "warp"),
    "an encoder-decoder": (
        write("tiny/config.json", json.dumps({"model_type": "t5", "d_model": 64, "architectures": ["T5"]})),
        PRUNE,
        "tiny",
    ),
    "an encoder": (
        write("tiny/config.json", json.dumps({"model_type": "vit", "hidden_size": 64})),
        PRUNE,
        "tiny",
    ),
    "code of its own": (
        config(model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}),
        PRUNE,
        "tiny",
    ),
    "a negative size": (config(hidden_size=-64), PRUNE, "tiny"),
    "a size of zero": (config(intermediate_size=0), PRUNE, "tiny"),
    "a size that is a word": (config(hidden_size="sixty-four"), PRUNE, "hidden_size"),
    "a size beyond memory": (config(hidden_size=2**40), PRUNE, "tiny"),
    "a size beyond 64 bits": (config(intermediate_size=2**70), PRUNE, "tiny"),
    "no attention heads": (config(num_attention_heads=0), PRUNE, "tiny"),
    "heads that do not divide": (config(num_attention_heads=7, head_dim=None), PRUNE, "tiny"),
    "no blocks": (config(num_hidden_layers=0), PRUNE, "tiny"),
    "a negative number of blocks": (config(num_hidden_layers=-3), PRUNE, "tiny"),
    "a billion blocks": (config(num_hidden_layers=10**9), PRUNE, "num_hidden_layers is 1000000000"),
    "one block too many": (config(num_hidden_layers=4), PRUNE, "model.layers.3"),
    "one block too few": (config(num_hidden_layers=2), PRUNE, "model.layers.2"),
    "another vocabulary": (config(vocab_size=500), PRUNE, "has shape [300, 64], config.json asks for [500, 64]"),
    "an unknown dtype": (config(dtype="float7"), PRUNE, "tiny"),
    "an unknown activation": (config(hidden_act="swish-swish"), PRUNE, "swish-swish"),
    "an unknown rotary embedding": (
        config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        PRUNE,
        "spiral",
    ),
    "an unknown quantisation": (
        config(quantization_config={"quant_method": "rot13"}),
        PRUNE,
        "quantised weights cannot be pruned",
    ),
}
TOKENIZERS = {
    "tokenizer.json of no bytes": (write("tiny/tokenizer.json", ""), PRUNE, "the tokenizer cannot be loaded"),
    "tokenizer.json that is no JSON": (write("tiny/tokenizer.json", "{"), PRUNE, "the tokenizer cannot be loaded"),
    "tokenizer.json without a model": (write("tiny/tokenizer.json", "{}"), PRUNE, "the tokenizer cannot be loaded"),
    "tokenizer_config.json that is no JSON": (
        write("tiny/tokenizer_config.json", "x"),
        PRUNE,
        "the tokenizer cannot be loaded",
    ),
    "tokenizer_config.json that is a list": (
        write("tiny/tokenizer_config.json", "[]"),
        PRUNE,
        "the tokenizer cannot be loaded",
    ),
    "tokenizer of an unknown class": (
        lambda: (
            os.remove("tiny/tokenizer.json"),
            write("tiny/tokenizer_config.json", '{"tokenizer_class": "Nope"}')(),
        ),
        PRUNE,
        "tokenizer",
    ),
    "no tokenizer": (
        lambda: [os.remove(f"tiny/{name}") for name in os.listdir("tiny") if "token" in name],
        PRUNE,
        "text needs a tokenizer",
    ),
    "tokens beyond the vocabulary": (
        tensors(
            lambda weights: weights.update(
                {name: weights[name][:40].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
            )
        ),
        PRUNE,
        "tiny",
    ),
}
TEXTS = {
    "an empty text": (write("bad.txt", ""), calibrated("bad.txt"), "holds no text"),
    "a text of blanks": (write("bad.txt", " \n" * 500), calibrated("bad.txt"), "holds no text"),
    "a text that is not UTF-8": (write("bad.txt", b"caf\xe9 " * 500), calibrated("bad.txt"), "is not UTF-8"),
    "a text in UTF-16": (write("bad.txt", ("words " * 500).encode("utf-16")), calibrated("bad.txt"), "is not UTF-8"),
    "a text with NUL bytes": (write("bad.txt", "ab\0c" * 500), calibrated("bad.txt"), "NUL"),
    "a text with an unknown suffix": (write("bad.doc", "words"), calibrated("bad.doc"), "a text file ends in"),
    "a text that is a folder": (folder_instead("bad.txt"), calibrated("bad.txt"), "is a folder"),
    "a text that links to itself": (link("bad.txt", "bad.txt"), calibrated("bad.txt"), "bad.txt"),
    "a text whose name is too long": (lambda: None, calibrated("a" * 300 + ".txt"), "aaa"),
    "a line that is no JSON": (write("bad.jsonl", '{"text": "a"}\n{'), calibrated("bad.jsonl"), "line 2: not JSON"),
    "a line that is no object": (write("bad.jsonl", '{"text": "a"}\n[]\n'), calibrated("bad.jsonl"), "line 2: each"),
    "a line without text": (write("bad.jsonl", '{"body": "a"}\n'), calibrated("bad.jsonl"), "no field 'text'"),
    "a line whose text is a number": (write("bad.jsonl", '{"text": 7}\n'), calibrated("bad.jsonl"), "must be text"),
    "a line of deep brackets": (write("bad.jsonl", "[" * 200_000), calibrated("bad.jsonl"), "line 1: not JSON"),
    "a line with a number of 10,000 digits": (
        write("bad.jsonl", f'{{"text": {"9" * 10_000}}}'),
        calibrated("bad.jsonl"),
        "line 1",
    ),
    "a line with half a character": (
        write("bad.jsonl", '{"text": "' + "\\ud800 word " * 50 + '"}\n'),
        calibrated("bad.jsonl"),
        "line 1",
    ),
    "a .gz that is none": (write("bad.jsonl.gz", "words"), calibrated("bad.jsonl.gz"), "cannot be read"),
    "a .gz cut short": (
        write("bad.jsonl.gz", gzip.compress(b'{"text": "words"}\n' * 99)[:-20]),
        calibrated("bad.jsonl.gz"),
        "cannot be read",
    ),
    "a .gz that swells": (
        lambda: write("bad.jsonl.gz", gzip.compress(bytes(1 << 30), 1) * 3)(),
        calibrated("bad.jsonl.gz"),
        "bad.jsonl.gz",
    ),
    "a .parquet that is none": (write("bad.parquet", "words"), calibrated("bad.parquet"), "not a readable .parquet"),
    "a .parquet without the column": (table(body=["a"]), calibrated("bad.parquet"), "no field 'text'"),
    "a .parquet of numbers": (table(text=[1, 2]), calibrated("bad.parquet"), "must be text"),
    "a .parquet without rows": (
        table(text=pyarrow.array([], pyarrow.string())),
        calibrated("bad.parquet"),
        "holds no text",
    ),
    "ids of floats": (array(np.ones((4, 16))), calibrated("bad.npy"), "must be integers"),
    "ids that are pickled": (array(np.array([{}, {}])), calibrated("bad.npy"), "not a readable .npy"),
    "ids in one row": (array(np.ones(64, np.int64)), calibrated("bad.npy"), "must be a matrix"),
    "ids of words": (array(np.array([["a"] * 16] * 2)), calibrated("bad.npy"), "not a readable .npy"),
    "ids beyond the vocabulary": (array(np.full((2, 16), 300)), calibrated("bad.npy"), "token id 300"),
    "ids below zero": (array(np.full((2, 16), -1)), calibrated("bad.npy"), "token id -1"),
    "ids beyond 64 bits": (array(np.full((2, 16), 2**64 - 1, np.uint64)), calibrated("bad.npy"), "bad.npy"),
    "ids cut short": (cut("ids.npy", -8), calibrated("ids.npy"), "not a readable .npy"),
    "ids that claim 8 EiB": (npy_header("(2, 576460752303423488)"), calibrated("bad.npy"), "not a readable .npy"),
    "ids of a negative size": (npy_header("(-2, 16)"), calibrated("bad.npy"), "bad.npy"),
    "ids whose header is no Python": (
        write("bad.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 17) + b"{'descr': [(('<i\n"),
        calibrated("bad.npy"),
        "not a readable .npy",
    ),
    "ids of no bytes": (write("bad.npy", ""), calibrated("bad.npy"), "not a readable .npy"),
    "ids of another width": (lambda: None, calibrated("ids.npy").replace("16", "8"), "use --samples 2"),
    "ids that are a folder": (folder_instead("bad.npy"), calibrated("bad.npy"), "is a folder"),
    "ids in text": (write("bad.safetensors", "words" * 9), calibrated("bad.safetensors"), "not a readable"),
    "ids in tensors without a name": (
        lambda: save_file({"a": torch.ones(2, 16), "b": torch.ones(2, 16)}, "bad.safetensors"),
        calibrated("bad.safetensors"),
        "found: a, b",
    ),
    "eval on an empty text": (write("bad.txt", ""), "eval tiny --text bad.txt --seq-len 16", "holds no text"),
    "eval on ids beyond the vocabulary": (
        array(np.full((2, 16), 300)),
        "eval tiny --text bad.npy --seq-len 16",
        "token id 300",
    ),
}
RECIPES = {
    "an empty recipe": (recipe(""), BY_RECIPE, "recipe.yaml"),
    "a recipe that is a list": (recipe("- a\n"), BY_RECIPE, "a recipe is"),
    "a recipe that is no YAML": (recipe("a: [b\n"), BY_RECIPE, "not valid YAML"),
    "a recipe that is not UTF-8": (recipe(b"method: \xff\n"), BY_RECIPE, "recipe.yaml"),
    "a recipe with NUL bytes": (recipe("method: wa\0nda\n"), BY_RECIPE, "recipe.yaml"),
    "a recipe of many aliases": (recipe(f"{LOL}skip: *a9\n"), BY_RECIPE, "recipe.yaml"),
    "a recipe that holds itself": (recipe("skip: &a [*a]\n"), BY_RECIPE, "recipe.yaml"),
    "a recipe of deep brackets": (recipe("skip: " + "[" * 5000), BY_RECIPE, "recipe.yaml"),
    "a recipe of deep keys": (recipe("".join(" " * i + "a:\n" for i in range(1500))), BY_RECIPE, "recipe.yaml"),
    "a recipe of 20 MB": (recipe("a: b\n" * 4_000_000), BY_RECIPE, "recipe.yaml"),
    "a recipe that calls python": (
        recipe("method: !!python/object/apply:os.mkdir [pickle-was-read]\n"),
        BY_RECIPE,
        "recipe.yaml",
    ),
    "a recipe of two documents": (recipe("method: wanda\n---\nmethod: rgs\n"), BY_RECIPE, "recipe.yaml"),
    "a recipe that says a thing twice": (recipe("method: wanda\nmethod: rgs\n"), BY_RECIPE, "method"),
    "a recipe with an unknown key": (recipe("metod: wanda\n"), BY_RECIPE, "did you mean 'method'?"),
    "a recipe with a list for a word": (recipe("method: [wanda]\n"), BY_RECIPE, "method"),
    "a recipe with a mapping for a number": (recipe("samples: {a: 1}\n"), BY_RECIPE, "samples"),
    "a recipe with an endless word": (recipe(f"method: {'x' * 100_000}\n"), BY_RECIPE, "method"),
    "a recipe with an endless key": (recipe(f"{'x' * 1000}: 1\n"), BY_RECIPE, "does not exist"),
    "a seed beyond 64 bits": (recipe(f"{GOOD_RECIPE}seed: {2**64}\n"), BY_RECIPE, "seed"),
    "more samples than memory": (
        recipe("calibration: self\nsamples: 1000000000000\nseq_len: 16\n"),
        BY_RECIPE,
        "samples",
    ),
    "a not finite number": (recipe("alpha: .inf\n"), BY_RECIPE, "alpha"),
    "an expression that is too long": (recipe("skip: a{99999999999}\n"), BY_RECIPE, "skip"),
    "an expression of deep brackets": (recipe(f"skip: '{'(' * 2000}{')' * 2000}'\n"), BY_RECIPE, "skip"),
    "a recipe that is a folder": (folder_instead("recipe.yaml"), BY_RECIPE, "the recipe cannot be read"),
    "a recipe that links to itself": (link("recipe.yaml", "recipe.yaml"), BY_RECIPE, "the recipe cannot be read"),
    "a recipe without a pattern": (recipe("sparsity: \n"), BY_RECIPE, "sparsity"),
}
OUTPUTS = {
    "the output is a file": (write("out", "precious"), PRUNE, "exists already"),
    "the output is the input": (lambda: None, f"prune pruned --out pruned --overwrite {PYDOC}", "pruned"),
    "the output is the input by another name": (
        link("same", "pruned"),
        f"prune pruned --out same --overwrite {PYDOC}",
        "same",
    ),
    "the output lies in the input": (lambda: None, f"prune tiny --out tiny/out {PYDOC}", "tiny/out"),
    "the input lies in the output": (
        lambda: shutil.move("tiny", "pruned/tiny"),
        f"prune pruned/tiny --out pruned --overwrite {PYDOC}",
        "pruned",
    ),
    "the output is a link to nothing": (link("out", "gone"), PRUNE, "out"),
    "the output is a link to itself": (link("out", "out"), PRUNE, "out"),
    "the output lies in a file": (write("file", ""), f"prune tiny --out file/out {PYDOC}", "cannot be made"),
    "the output's name is too long": (lambda: None, f"prune tiny --out {'o' * 256} {PYDOC}", "cannot be made"),
    "the output's name leaves no room": (lambda: None, f"prune tiny --out {'o' * 250} {PYDOC}", "cannot be made"),
    "the output has a NUL": (recipe('out: "a\\0b"\n'), f"prune tiny --config recipe.yaml {PYDOC}", "out"),
    "the output is nothing": (recipe("out: ''\n"), f"prune tiny --config recipe.yaml {PYDOC}", "out"),
    "the output is the current folder": (lambda: None, f"prune tiny --out . --overwrite {PYDOC}", "."),
    "tokens saved as text": (lambda: None, f"{PRUNE} --save-calibration t.txt", "t.txt: token ids are saved"),
    "tokens saved nowhere": (lambda: None, f"{PRUNE} --save-calibration gone/t.npy", "gone/t.npy: cannot be written"),
    "tokens saved over a folder": (lambda: os.mkdir("t.npy"), f"{PRUNE} --save-calibration t.npy", "t.npy"),
    "packed output in the input": (lambda: None, "pack pruned pruned/packed", "pruned/packed"),
    "packed output over the input": (lambda: None, "pack pruned pruned --overwrite", "pruned"),
    "unpacked output over the input": (lambda: None, "unpack packed packed --overwrite", "packed"),
}
PACKED = {
    "packing what is dense": (lambda: None, "pack tiny out --sparsity 2:4", "2:4"),
    "packing nothing": (lambda: None, "pack gone out", "gone"),
    "packing a link to itself": (link("loop", "loop"), "pack loop out", "loop"),
    "packing a corrupt file": (cut("pruned/model.safetensors", -1), "pack pruned out", "corrupt or incomplete"),
    "packing NaN weights": (
        tensors(lambda weights: weights[Q_PROJ].fill_(float("nan")), "pruned/model.safetensors"),
        "pack pruned out",
        Q_PROJ.removesuffix(".weight"),
    ),
    "packing by a recipe of aliases": (
        write("pruned/wandapp/recipe.yaml", f"{LOL}skip: *a9\n"),
        "pack pruned out",
        "recipe.yaml",
    ),
    "unpacking what is dense": (lambda: None, "unpack pruned out", "no packed checkpoint here"),
    "a manifest of another version": (manifest(version=9), "unpack packed out", "version"),
    "a manifest that leaves the folder": (
        manifest(files=["../tiny/model.safetensors"]),
        "verify packed --sparsity 2:4",
        "no file of this folder",
    ),
    "a manifest of deep brackets": (
        write("packed/wandapp/packed.json", "[" * 100_000),
        "unpack packed out",
        "packed.json",
    ),
    "a packed file cut short": (cut("packed/packed-00001-of-00004.safetensors", -1), "unpack packed out", "corrupt"),
    "a packed file that is gone": (
        lambda: os.remove("packed/packed-00002-of-00004.safetensors"),
        "generate packed hello",
        "no such file",
    ),
    "a packed config of a billion blocks": (
        lambda: Path("packed/config.json").write_text(
            json.dumps(json.loads(Path("packed/config.json").read_text()) | {"num_hidden_layers": 10**9})
        ),
        "eval packed --text words.txt --seq-len 16",
        "num_hidden_layers is 1000000000",
    ),
    "benchmarking nothing": (lambda: None, "bench inference gone", "gone"),
    "verifying nothing": (lambda: None, "verify gone", "gone"),
    "verifying by no pattern": (write("pruned/wandapp/recipe.yaml", "sparsity: x\n"), "verify pruned", "neither n:m"),
}
GGUFS = {
    "a .gguf of four bytes": (write("bad.gguf", "GGUF"), f"prune bad.gguf --out out {PYDOC}", "bad.gguf"),
    "a .gguf of noise": (write("bad.gguf", b"GGUF" + b"\xff" * 4096), f"prune bad.gguf --out out {PYDOC}", "bad.gguf"),
    "a .gguf cut in the header": (gguf(40), f"prune bad.gguf --out out {PYDOC}", "bad.gguf"),
    "a .gguf cut in the data": (gguf(1000), f"prune bad.gguf --out out {PYDOC}", "bad.gguf"),
    "a .gguf of another kind": (write("bad.gguf", "ggml" * 9), f"prune bad.gguf --out out {PYDOC}", "starts with"),
    "a .gguf that is a folder": (folder_instead("bad.gguf"), f"prune bad.gguf --out out {PYDOC}", "bad.gguf"),
    "a .gguf that links to itself": (link("bad.gguf", "bad.gguf"), f"prune bad.gguf --out out {PYDOC}", "bad.gguf"),
}


def unfinished(manifest_text: str | None, block: bytes | None = None):
    """OUT.partial of an interrupted run: one finished block, and a manifest."""

    def damage() -> None:
        os.makedirs("out.partial/wandapp")
        Path("out.partial/wandapp/lock").touch()
        weights = Path("tiny/model.safetensors").read_bytes() if block is None else block
        Path("out.partial/model-00001-of-00004.safetensors").write_bytes(weights)
        if manifest_text is not None:
            Path("out.partial/wandapp/run.json").write_text(manifest_text)

    return damage


RESUME = f"{PRUNE} --resume"
RUNS = {
    "an unfinished run in the way": (unfinished("{}"), PRUNE, "continue it with --resume"),
    "an unfinished run without its manifest": (unfinished(None), RESUME, "run.json: cannot be read"),
    "an unfinished run with an empty manifest": (unfinished("{}"), RESUME, "run.json: cannot be read"),
    "an unfinished run with a manifest of brackets": (unfinished("[" * 100_000), RESUME, "run.json: cannot be read"),
    "an unfinished run with a damaged block": (unfinished("{}", b"\xff" * 100), RESUME, "out.partial"),
    "OUT.partial is a file": (write("out.partial", "precious"), RESUME, "out.partial"),
}
SWEEP = "sweep sweep.yaml"
SWEEPS = {
    "no sweep file": (lambda: None, SWEEP, "sweep.yaml: the sweep cannot be read"),
    "a sweep without out": (write("sweep.yaml", "models: [tiny]\n"), SWEEP, "needs out"),
    "a sweep without models": (write("sweep.yaml", "out: runs\n"), SWEEP, "needs models"),
    "a sweep with an unknown key": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\nmetods: [wanda]\n"),
        SWEEP,
        "did you mean 'methods'?",
    ),
    "a sweep of an unknown method": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\nmethods: [wanda, wnda]\n"),
        SWEEP,
        "did you mean 'wanda'?",
    ),
    "a sweep of a bad pattern": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\npatterns: ['2:4', '4:2']\n"),
        SWEEP,
        "0 < n < m, got 4:2",
    ),
    "a sweep that says a thing twice": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\nmodel: tiny\n"),
        SWEEP,
        "is given twice",
    ),
    "a sweep of no seeds": (write("sweep.yaml", "out: runs\nmodels: [tiny]\nseeds: []\n"), SWEEP, "an empty list"),
    "a sweep without bounds": (
        write(
            "sweep.yaml",
            "out: r\nmodels: [a]\n" + "".join(f"{k}: {list(range(99))}\n" for k in ("seeds", "alpha", "samples")),
        ),
        SWEEP,
        "a sweep has at most",
    ),
    "a sweep that excludes nothing": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\nexclude: [{seed: 7}]\n"),
        SWEEP,
        "matches no job",
    ),
    "a sweep that excludes everything": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\nexclude: [{seed: 0}]\n"),
        SWEEP,
        "no job is left",
    ),
    "a sweep that excludes by a list": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\nexclude: [wanda]\n"),
        SWEEP,
        "exclude",
    ),
    "a sweep with an unknown evaluation": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\nevaluate: {txt: pydoc}\n"),
        SWEEP,
        "did you mean 'text'?",
    ),
    "a sweep with its own output": (
        write("sweep.yaml", "out: runs\nmodels: [tiny]\noverwrite: true\n"),
        SWEEP,
        "overwrite cannot be set in a sweep",
    ),
    "a sweep of aliases": (write("sweep.yaml", f"{LOL}out: *a9\n"), SWEEP, "alias"),
    "a job that does not exist": (write("sweep.yaml", "out: runs\nmodels: [tiny]\n"), f"{SWEEP} --job 7", "job 7"),
}
CASES = RUNS | SWEEPS | WEIGHTS | CONFIGS | TOKENIZERS | TEXTS | RECIPES | OUTPUTS | PACKED | GGUFS


@pytest.fixture
def place(originals, tmp_path, monkeypatch) -> Path:
    return copy_of(originals, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_broken_input_gets_one_sentence_and_nothing_is_written(case, place, monkeypatch, capfd):
    check_refusal(*CASES[case], place, monkeypatch, capfd)
