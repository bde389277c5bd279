"""More hostile files, by container: safetensors headers, pipes and devices, truncation at many places, numbers out of range.

As in test_hostile_input.py: exit code 2, one sentence, nothing written, no traceback, soon and without much memory.
"""

import io
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
    check_refusal,
    config,
    copy_of,
    cut,
    folder_instead,
    header,
    index,
    link,
    map_to,
    recipe,
    table,
    tensors,
    write,
)
from safetensors.torch import load_file, save_file

WEIGHTS = "tiny/model.safetensors"
STREAM = f"{PRUNE} --stream"
PLAN = f"{PRUNE} --plan"
GGUF = f"prune bad.gguf --out out {PYDOC}"


def calibrated(name: str) -> str:
    return f"prune tiny --out out --calibration {name} {SHORT}"


# Ways to break a file -------------------------------------------------------------------------------------------------


def edited_header(edit):
    """The weights' header after `edit(dict)`, which may return other bytes for it; the tensors' bytes stay."""

    def damage() -> None:
        content = Path(WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        tensors = json.loads(content[8 : 8 + size])
        text = edit(tensors) or json.dumps(tensors).encode()
        Path(WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return damage


def entry(**fields):
    """The header's entry of Q_PROJ with other fields."""
    return edited_header(lambda tensors: tensors[Q_PROJ].update(fields))


def again(**fields):
    """The entry of Q_PROJ twice in the header, the second with other fields; JSON readers keep the last."""

    def edit(tensors: dict) -> bytes:
        second = json.dumps(tensors[Q_PROJ] | fields)
        return json.dumps(tensors).encode()[:-1] + f', "{Q_PROJ}": {second}}}'.encode()

    return edited_header(edit)


def same_bytes(tensors: dict) -> None:
    """Two tensors share their bytes, and nobody owns the last ones."""
    tensors[Q_PROJ]["data_offsets"] = tensors[Q_PROJ.replace("q_proj", "o_proj")]["data_offsets"]


def pipe(name: str):
    """A named pipe, which blocks whoever opens it, in the place of a file."""

    def damage() -> None:
        if os.path.exists(name):
            os.remove(name)
        os.mkfifo(name)

    return damage


def device(name: str):
    """A link to the device that never ends."""
    return link(name, "/dev/zero")


def gguf_cut(keep: int):
    """The first `keep` bytes of a good .gguf; counted from its end where negative."""

    def damage() -> None:
        shutil.copy("good.gguf", "bad.gguf")
        cut("bad.gguf", keep)()

    return damage


def gguf_bytes(place: int, value: bytes):
    """A good .gguf with other bytes at one place."""

    def damage() -> None:
        content = bytearray(Path("good.gguf").read_bytes())
        content[place : place + len(value)] = value
        Path("bad.gguf").write_bytes(content)

    return damage


def gguf_shape(size: int):
    """A good .gguf whose first tensor claims another size."""

    def damage() -> None:
        content = Path("good.gguf").read_bytes()
        name = b"token_embd.weight"
        place = content.index(name) + len(name) + 4  # behind the number of dimensions
        gguf_bytes(place, struct.pack("<Q", size))()

    return damage


def parquet_cut(keep: int):
    def damage() -> None:
        table(text=["words and words"] * 500)()
        cut("bad.parquet", keep)()

    return damage


def npy(values):
    """A .npy file of anything numpy can save without pickling."""

    def damage() -> None:
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=True)
        Path("bad.npy").write_bytes(buffer.getvalue())

    return damage


def ids(**tensors):
    return lambda: save_file(tensors, "bad.safetensors")


def interrupted(edit=lambda manifest: None, block=lambda weights: None):
    """A real run stopped after one block, its manifest and its block's file then edited."""

    def damage() -> None:
        from wandapp import PruneConfig
        from wandapp.errors import Interrupted
        from wandapp.job import prune_checkpoint

        def stop(progress):
            raise Interrupted("stopped")

        options = dict(model="tiny", out="out", calibration="pydoc", samples=2, seq_len=16)
        with pytest.raises(Interrupted):
            prune_checkpoint(PruneConfig(**options), on_progress=stop)
        path = Path("out.partial/wandapp/run.json")
        manifest = json.loads(path.read_text())
        edit(manifest)
        path.write_text(json.dumps(manifest))
        shard = Path("out.partial/model-00001-of-00004.safetensors")
        weights = load_file(shard)
        if (metadata := block(weights)) is not None:
            save_file(weights, shard, metadata=metadata)

    return damage


def precious(name: str, linked: bool = False):
    """A folder of somebody's where a command would put its unfinished output."""

    def damage() -> None:
        place = "elsewhere" if linked else name
        os.makedirs(place)
        Path(place, "thesis.txt").write_text("years of work")
        if linked:
            os.symlink(place, name)

    return damage


HEADERS = {
    "a name twice in a header": (again(), PRUNE, "twice"),
    "a name twice in a header, streamed": (again(), STREAM, "twice"),
    "a name twice with other bytes": (again(data_offsets=[0, 16384]), PRUNE, WEIGHTS),
    "a negative offset": (entry(data_offsets=[-16384, 0]), PRUNE, "corrupt or incomplete"),
    "offsets the wrong way round": (entry(data_offsets=[16384, 0]), PRUNE, "corrupt or incomplete"),
    "an offset beyond 64 bits": (entry(data_offsets=[0, 2**64]), PRUNE, "corrupt or incomplete"),
    "an offset of 400 digits": (entry(data_offsets=[0, 10**400]), PRUNE, "corrupt or incomplete"),
    "a fractional offset": (entry(data_offsets=[0.5, 16384.5]), PRUNE, "corrupt or incomplete"),
    "tensors that share bytes": (edited_header(same_bytes), PRUNE, "corrupt or incomplete"),
    "bytes that no tensor owns": (edited_header(lambda t: t.pop(Q_PROJ) and None), PRUNE, "corrupt or incomplete"),
    "bytes behind the last tensor": (
        lambda: Path(WEIGHTS).write_bytes(Path(WEIGHTS).read_bytes() + bytes(64)),
        PRUNE,
        "corrupt or incomplete",
    ),
    "a shape whose size overflows": (entry(shape=[2**40, 2**40]), PRUNE, "corrupt or incomplete"),
    "a shape that is a word": (entry(shape="64x64"), PRUNE, "corrupt or incomplete"),
    "a shape that is missing": (
        edited_header(lambda t: t[Q_PROJ].pop("shape") and None),
        PRUNE,
        "corrupt or incomplete",
    ),
    "a weight without dimensions": (
        tensors(lambda weights: weights.update({Q_PROJ: torch.tensor(1.0)})),
        PRUNE,
        f"{Q_PROJ} has shape []",
    ),
    "a weight without rows": (
        tensors(lambda weights: weights.update({Q_PROJ: torch.zeros(0, 64)})),
        PRUNE,
        f"{Q_PROJ} has shape [0, 64]",
    ),
    "weights of 8 bits": (
        tensors(lambda weights: weights.update({Q_PROJ: torch.zeros(64, 64).to(torch.float8_e4m3fn)})),
        PRUNE,
        f"{Q_PROJ} has the type F8_E4M3",
    ),
    "weights of 8 bits, streamed": (
        tensors(lambda weights: weights.update({Q_PROJ: torch.zeros(64, 64).to(torch.float8_e5m2)})),
        STREAM,
        f"{Q_PROJ} has the type F8_E5M2",
    ),
    "complex weights": (
        tensors(lambda weights: weights.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.complex64)})),
        PRUNE,
        Q_PROJ,
    ),
    "metadata that is no text": (edited_header(lambda t: t.update(__metadata__={"format": 7})), PRUNE, "corrupt"),
    "a header that is not UTF-8": (header(b'{"\xff": {}}    '), PRUNE, "corrupt or incomplete"),
    "a header that is a list": (header("[]      "), PRUNE, "corrupt or incomplete"),
    "a header of no bytes": (header(""), PRUNE, "corrupt or incomplete"),
    "a name with a line end": (edited_header(lambda t: t.update({"a\nb": t.pop(Q_PROJ)})), PRUNE, "printable"),
    "many empty tensors": (
        header(json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5_000)})),
        PRUNE,
        "tiny",
    ),
    "an index that names a folder": (
        lambda: (map_to("shard.safetensors")(), os.mkdir("tiny/shard.safetensors")),
        PRUNE,
        "shard.safetensors",
    ),
    "an index with a dot for a file": (map_to("."), PRUNE, "no file of this folder"),
    "an index with a home for a file": (map_to("~/weights.safetensors"), PRUNE, "no file of this folder"),
    "an index of numbers for names": (
        index(lambda whole: {"weight_map": {"0": "one.safetensors"}}),
        PRUNE,
        "not",
    ),
    "a shard that links to something else": (link(WEIGHTS, "/etc/passwd"), PRUNE, "corrupt or incomplete"),
    "a shard that links to a folder": (link(WEIGHTS, "/etc"), PRUNE, WEIGHTS),
    "weights from a pipe": (pipe(WEIGHTS), PRUNE, WEIGHTS),
    "weights from a pipe, planned": (pipe(WEIGHTS), PLAN, WEIGHTS),
    "weights from a device": (device(WEIGHTS), PRUNE, WEIGHTS),
    "verify weights from a pipe": (pipe("pruned/model.safetensors"), "verify pruned", "pruned/model.safetensors"),
    "pack weights from a pipe": (pipe("pruned/model.safetensors"), "pack pruned out", "pruned/model.safetensors"),
    "inspect weights from a pipe": (pipe("pruned/model.safetensors"), "inspect pruned", "pruned/model.safetensors"),
}
PIPES = {
    "config.json from a pipe": (pipe("tiny/config.json"), PRUNE, "config.json"),
    "config.json from a device": (device("tiny/config.json"), PRUNE, "config.json"),
    "an index from a pipe": (pipe("tiny/model.safetensors.index.json"), PRUNE, "model.safetensors.index.json"),
    "a tokenizer from a pipe": (pipe("tiny/tokenizer.json"), PRUNE, "tokenizer.json"),
    "a tokenizer from a device": (device("tiny/tokenizer.json"), PRUNE, "tokenizer.json"),
    "a tokenizer's config from a pipe": (pipe("tiny/tokenizer_config.json"), PRUNE, "tokenizer_config.json"),
    "a generation config from a pipe": (pipe("tiny/generation_config.json"), PRUNE, "generation_config.json"),
    "a recipe from a device": (device("recipe.yaml"), BY_RECIPE, "recipe.yaml"),
    "text from a pipe": (pipe("bad.txt"), calibrated("bad.txt"), "bad.txt"),
    "text from a device": (device("bad.txt"), calibrated("bad.txt"), "bad.txt"),
    "ids from a pipe": (pipe("bad.npy"), calibrated("bad.npy"), "bad.npy"),
    "a .parquet from a pipe": (pipe("bad.parquet"), calibrated("bad.parquet"), "bad.parquet"),
    "a .gguf from a pipe": (pipe("bad.gguf"), GGUF, "bad.gguf"),
    "a .gguf from a device": (device("bad.gguf"), GGUF, "bad.gguf"),
    "a packed manifest from a pipe": (pipe("packed/wandapp/packed.json"), "unpack packed out", "packed.json"),
    "a recipe of the checkpoint from a pipe": (pipe("pruned/wandapp/recipe.yaml"), "verify pruned", "recipe.yaml"),
}
CONFIGS = {
    "a fractional number of blocks": (config(num_hidden_layers=2.5), PRUNE, "num_hidden_layers"),
    "a number of blocks in words": (config(num_hidden_layers="3"), PRUNE, "num_hidden_layers"),
    "blocks of a list": (config(num_hidden_layers=[3]), PRUNE, "num_hidden_layers"),
    "true blocks": (config(num_hidden_layers=True), PRUNE, "tiny"),
    "a hundred thousand blocks": (config(num_hidden_layers=100_000), PRUNE, "100000 blocks"),
    "a hundred thousand blocks, planned": (config(num_hidden_layers=100_000), PLAN, "100000 blocks"),
    "a hundred thousand blocks, streamed": (config(num_hidden_layers=100_000), STREAM, "100000 blocks"),
    "10^18 blocks in a nested config": (config(text_config={"num_hidden_layers": 10**18}), PRUNE, "num_hidden_layers"),
    "sizes that are not numbers": (config(rms_norm_eps="small"), PRUNE, "rms_norm_eps"),
    "an epsilon of NaN": (config(rms_norm_eps=float("nan")), PRUNE, "must be finite"),
    "a head size of zero": (config(head_dim=0), PRUNE, "tiny"),
    "more key heads than heads": (config(num_key_value_heads=8), PRUNE, "tiny"),
    "key heads that do not divide": (config(num_key_value_heads=3), PRUNE, "tiny"),
    "a vocabulary of 2^40": (config(vocab_size=2**40), PRUNE, "tiny"),
    "a model type that is a list": (config(model_type=["llama"]), PRUNE, "tiny"),
    "layer types that do not fit": (config(layer_types=["full_attention"]), PRUNE, "tiny"),
    "an architecture of another kind": (config(model_type="gpt2"), PRUNE, "tiny"),
    "a rotary base of zero": (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), PRUNE, ""),
    "a padding token beyond the vocabulary": (config(pad_token_id=10**9), PRUNE, "tiny"),
}
TOKENIZERS = {
    "a tokenizer cut short": (cut("tiny/tokenizer.json", 900), PRUNE, "the tokenizer cannot be loaded"),
    "a tokenizer whose ids are far out": (
        write(
            "tiny/tokenizer.json",
            json.dumps(
                {
                    "version": "1.0",
                    "added_tokens": [],
                    "pre_tokenizer": {"type": "Whitespace"},
                    "model": {"type": "WordLevel", "vocab": {"the": 10**9, "[UNK]": 1}, "unk_token": "[UNK]"},
                }
            ),
        ),
        PRUNE,
        "token id 1000000000",
    ),
    "a sentencepiece model of noise": (
        lambda: (
            os.remove("tiny/tokenizer.json"),
            write("tiny/tokenizer.model", b"\x0a\x0e" + b"\xff" * 300)(),
            write("tiny/tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}')(),
        ),
        PRUNE,
        "token",
    ),
    "a vocabulary without its merges": (
        lambda: (
            os.remove("tiny/tokenizer.json"),
            write("tiny/vocab.json", "{")(),
            write("tiny/tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}')(),
        ),
        PRUNE,
        "token",
    ),
    "a tokenizer that is a folder": (folder_instead("tiny/tokenizer.json"), PRUNE, "token"),
    "a generation config of noise": (write("tiny/generation_config.json", b"\xff\xfe"), PRUNE, "tiny"),
}
IDS = {
    "ids of objects": (npy(np.array([[None] * 16] * 2)), calibrated("bad.npy"), "not a readable .npy"),
    "ids in records": (npy(np.zeros((2, 16), [("a", "i4"), ("b", "f8")])), calibrated("bad.npy"), "bad.npy"),
    "ids of dates": (npy(np.zeros((2, 16), "datetime64[s]")), calibrated("bad.npy"), "bad.npy"),
    "complex ids": (npy(np.zeros((2, 16), complex)), calibrated("bad.npy"), "must be integers"),
    "true and false for ids": (npy(np.zeros((2, 16), bool)), calibrated("bad.npy"), "must be integers"),
    "ids without samples": (npy(np.zeros((0, 16), int)), calibrated("bad.npy"), "must be a matrix"),
    "ids without tokens": (npy(np.zeros((2, 0), int)), calibrated("bad.npy"), "must be a matrix"),
    "ids in three dimensions": (npy(np.zeros((2, 4, 4), int)), calibrated("bad.npy"), "must be a matrix"),
    "one id": (npy(np.int64(3)), calibrated("bad.npy"), "must be a matrix"),
    "a .npz named .npy": (
        lambda: np.savez(open("bad.npy", "wb"), a=np.ones((2, 16), int)),
        calibrated("bad.npy"),
        "bad",
    ),
    "ids of unknown version": (write("bad.npy", b"\x93NUMPY\x09\x00" + bytes(200)), calibrated("bad.npy"), "bad.npy"),
    "a header longer than the file": (
        write("bad.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31)),
        calibrated("bad.npy"),
        "bad.npy",
    ),
    "floats for ids": (ids(tokens=torch.ones(2, 16)), calibrated("bad.safetensors"), "must be integers"),
    "ids in three dimensions, safetensors": (
        ids(tokens=torch.ones(2, 4, 4, dtype=torch.int64)),
        calibrated("bad.safetensors"),
        "must be a matrix",
    ),
    "ids of no tensors": (ids(), calibrated("bad.safetensors"), "found: none"),
    "ids cut short, safetensors": (
        lambda: (ids(tokens=torch.ones(2, 16, dtype=torch.int64))(), cut("bad.safetensors", -1)()),
        calibrated("bad.safetensors"),
        "not a readable",
    ),
}
TEXTS = {
    "a line whose text is null": (write("bad.jsonl", '{"text": null}\n'), calibrated("bad.jsonl"), "line 1"),
    "a line whose text is a list": (write("bad.jsonl", '{"text": ["a"]}\n'), calibrated("bad.jsonl"), "must be text"),
    "a line that is null": (write("bad.jsonl", "null\n"), calibrated("bad.jsonl"), "line 1: each"),
    "a line with a byte order mark": (
        write("bad.jsonl", b'\xef\xbb\xbf{"text": "a"}\n'),
        calibrated("bad.jsonl"),
        "line 1",
    ),
    "lines whose texts are empty": (write("bad.jsonl", '{"text": ""}\n' * 9), calibrated("bad.jsonl"), "holds no text"),
    "one document over many lines": (write("bad.jsonl", '{\n"text": "a"\n}\n'), calibrated("bad.jsonl"), "line 1"),
    "a .parquet of lists": (table(text=[["a"], ["b"]]), calibrated("bad.parquet"), "must be text"),
    "a .parquet of bytes": (table(text=[b"\xff\xfe"]), calibrated("bad.parquet"), "must be text"),
    "a .parquet of nulls": (
        table(text=pyarrow.array([None, None], pyarrow.string())),
        calibrated("bad.parquet"),
        "holds no text",
    ),
    **{
        f"a .parquet cut at {keep}": (parquet_cut(keep), calibrated("bad.parquet"), "not a readable .parquet")
        for keep in (4, 60, -9, -1)
    },
}
RECIPES = {
    "merged keys in a recipe": (recipe("a: &a {method: wanda}\n<<: *a\n"), BY_RECIPE, "recipe.yaml"),
    "anchors in anchors": (recipe("skip: &a [&b [&c [x]]]\nmodel: *b\n"), BY_RECIPE, "alias"),
    "a recipe of one word": (recipe("wanda"), BY_RECIPE, "a recipe is"),
    "a recipe of lists in lists": (recipe("- - - wanda\n"), BY_RECIPE, "a recipe is"),
    "a date for a method": (recipe("method: 2024-01-01\n"), BY_RECIPE, "method"),
    "bytes for a method": (recipe("method: !!binary aGFybQ==\n"), BY_RECIPE, "tag"),
    "a set for what to skip": (recipe("skip: !!set {a, b}\n"), BY_RECIPE, "tag"),
    "a key that is a list": (recipe("? [a, b]\n: wanda\n"), BY_RECIPE, "recipe.yaml"),
    "a key that is null": (recipe("null: wanda\n"), BY_RECIPE, "does not exist"),
    "a number of 10,000 digits": (recipe(f"samples: {'9' * 10_000}\n"), BY_RECIPE, "samples"),
    "samples below zero": (recipe("samples: -1\n"), BY_RECIPE, "samples"),
    "half a sample": (recipe("samples: 0.5\n"), BY_RECIPE, "samples"),
    "a damping of NaN": (recipe("damping: .nan\n"), BY_RECIPE, "damping"),
    "terminal codes in a method": (recipe('method: "\\e[2Jwanda"\n'), BY_RECIPE, "method"),
}
GGUFS = {
    **{
        f"a .gguf cut at {keep}": (gguf_cut(keep), GGUF, "bad.gguf")
        for keep in (5, 12, 24, 47, 400, 5000, -200_000, -1)
    },
    "a .gguf cut in the data, streamed": (gguf_cut(-50_000), f"{GGUF} --stream", "bad.gguf"),
    "a .gguf cut in the header, streamed": (gguf_cut(400), f"{GGUF} --stream", "bad.gguf"),
    "a .gguf cut in the header, planned": (gguf_cut(400), f"{GGUF} --plan", "bad.gguf"),
    "a .gguf of an unknown version": (gguf_bytes(4, struct.pack("<I", 77)), GGUF, "bad.gguf"),
    "a .gguf of 2^60 tensors": (gguf_bytes(8, struct.pack("<Q", 2**60)), GGUF, "bad.gguf"),
    "a .gguf of 2^60 fields": (gguf_bytes(16, struct.pack("<Q", 2**60)), GGUF, "bad.gguf"),
    "a .gguf with a name of 2^60 bytes": (gguf_bytes(24, struct.pack("<Q", 2**60)), GGUF, "bad.gguf"),
    "a .gguf with a tensor of 2^60 columns": (gguf_shape(2**60), GGUF, "bad.gguf"),
    "a .gguf with a tensor of no columns": (gguf_shape(0), GGUF, "bad.gguf"),
}
RESUME = f"{PRUNE} --resume"
RUNS = {
    "a manifest of -1 blocks": (interrupted(lambda m: m.update(blocks=-1)), RESUME, "out.partial"),
    "a manifest of more blocks": (interrupted(lambda m: m.update(blocks=9)), RESUME, "blocks was 9 and is now 3"),
    "a manifest without its recipe": (interrupted(lambda m: m.pop("recipe")), RESUME, "run.json: cannot be read"),
    "a finished block of other shapes": (
        interrupted(
            block=lambda w: w.update({k: torch.zeros(3) for k in w}) or {"format": "pt", "block": '{"name": "a"}'}
        ),
        RESUME,
        "out.partial",
    ),
    "a finished block without a report": (
        interrupted(block=lambda w: {"format": "pt"}),
        RESUME,
        "not written by wandapp",
    ),
    "a finished block with another's report": (
        interrupted(block=lambda w: {"format": "pt", "block": "[1, 2]"}),
        RESUME,
        "not written by wandapp",
    ),
    "somebody's folder at OUT.partial": (precious("out.partial"), PRUNE, "out.partial"),
    "somebody's folder at OUT.partial, resumed": (precious("out.partial"), RESUME, "out.partial"),
    "somebody's folder in the way of packing": (precious("out.partial"), "pack pruned out", "out.partial"),
    "OUT.partial links to somebody's folder": (precious("out.partial", linked=True), PRUNE, "out.partial"),
}
QUICK = {
    "a name twice in a header",
    "a negative offset",
    "a weight without dimensions",
    "weights of 8 bits, streamed",
    "weights from a pipe",
    "a tokenizer from a pipe",
    "a generation config of noise",
    "a .npz named .npy",
    "a line whose text is null",
    "a .gguf cut in the header, streamed",
    "somebody's folder at OUT.partial, resumed",
    "OUT.partial links to somebody's folder",
}
CASES = HEADERS | PIPES | CONFIGS | TOKENIZERS | IDS | TEXTS | RECIPES | GGUFS | RUNS


@pytest.fixture
def place(originals, tmp_path, monkeypatch) -> Path:
    return copy_of(originals, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES])
def test_hostile_files_get_one_sentence_and_nothing_is_written(case, place, monkeypatch, capfd):
    check_refusal(*CASES[case], place, monkeypatch, capfd)
