"""Broken files for the tests of hostile input: ways to break one, and the check that a command refuses it well.

Each `damage` is a function that makes one thing wrong in the current folder, which holds `tiny`, a checkpoint; `pruned`, the
same after pruning; `packed`, that packed; `words.txt` and `ids.npy`, good calibration files.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny import write_gguf

from wandapp import save_pruned

SHORT = "--samples 2 --seq-len 16"
PYDOC = f"--calibration pydoc {SHORT}"
PRUNE = f"prune tiny --out out {PYDOC}"
BY_RECIPE = "prune tiny --out out --config recipe.yaml"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
MIB_AT_MOST = 600  # that a case may add to the resident memory of this process
SECONDS_AT_MOST = 8.0

Damage = Callable[[], object]


def make_originals(folder: Path, model, tokenizer, pruned: Path) -> None:
    """The good files, in `folder`."""
    from wandapp.packing import pack_checkpoint

    save_pruned(model, tokenizer, folder / "tiny", files={})
    shutil.copytree(pruned, folder / "pruned")
    pack_checkpoint(folder / "pruned", folder / "packed")
    write_gguf(folder / "good.gguf", model)
    (folder / "words.txt").write_text("The sea is deep and the sky is high. " * 50)
    np.save(folder / "ids.npy", np.ones((2, 16), np.int64))


def write(name: str, content: str | bytes):
    """The file `name`, with that content."""

    def damage() -> None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).unlink(missing_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str, keep: int):
    """The file's first `keep` bytes; counted from its end where negative."""
    return lambda: os.truncate(name, keep % os.path.getsize(name))


def config(**fields):
    """config.json of `tiny` with other fields; None removes one."""

    def damage() -> None:
        path = Path("tiny/config.json")
        changed = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return damage


def tensors(edit, name: str = "tiny/model.safetensors"):
    """The weights after `edit(dict)`."""

    def damage() -> None:
        weights = load_file(name)
        edit(weights)
        save_file(weights, name, metadata={"format": "pt"})

    return damage


def fill(name: str, value: float):
    """One weight of tensor `name` set to `value`."""
    return tensors(lambda weights: weights[name].view(-1)[7:8].fill_(value))


def header(text: str | bytes, length: int | None = None):
    """A safetensors file of that header alone."""
    text = text.encode() if isinstance(text, str) else text
    return write("tiny/model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text)


def index(edit):
    """`tiny` in two shards, with `edit(index)` applied to its index file."""

    def damage() -> None:
        weights = load_file("tiny/model.safetensors")
        names = sorted(weights)
        halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
        for file, half in halves.items():
            save_file({name: weights[name] for name in half}, f"tiny/{file}", metadata={"format": "pt"})
        os.remove("tiny/model.safetensors")
        whole = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
        Path("tiny/model.safetensors.index.json").write_text(json.dumps(edit(whole) or whole))

    return damage


def link(name: str, target: str):
    """A symbolic link in the place of `name`."""

    def damage() -> None:
        if os.path.isdir(name):
            shutil.rmtree(name)
        elif os.path.lexists(name):
            os.remove(name)
        os.symlink(target, name)

    return damage


def folder_instead(name: str):
    """A folder where the file `name` should be, which nobody can read (root reads any file)."""

    def damage() -> None:
        if os.path.exists(name):
            os.remove(name)
        os.mkdir(name)

    return damage


def pickled(name: str, remove: str = "tiny/model.safetensors"):
    """Pickled weights, which would run code, in the place of `remove`."""

    def damage() -> None:
        class Bomb:
            def __reduce__(self):
                return os.mkdir, ("pickle-was-read",)

        if os.path.exists(remove):
            os.remove(remove)
        Path(name).write_bytes(pickle.dumps(Bomb()))

    return damage


def twice(weights_index: dict) -> None:
    """The second shard holds a tensor of the first once more."""
    first = load_file("tiny/one.safetensors")
    again = dict(list(first.items())[:1])
    save_file(load_file("tiny/two.safetensors") | again, "tiny/two.safetensors", metadata={"format": "pt"})


def map_to(file):
    """The first tensor's file in the index is `file`."""

    def edit(whole: dict) -> None:
        whole["weight_map"][min(whole["weight_map"])] = file

    return index(edit)


def array(values, name: str = "bad.npy"):
    return lambda: np.save(name, values, allow_pickle=True)


def npy_header(shape: str):
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return write("bad.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + b"\0" * 64)


def table(**columns):
    return lambda: parquet.write_table(pyarrow.table(columns), "bad.parquet")


def recipe(text: str | bytes):
    return write("recipe.yaml", text)


def manifest(**fields):
    path = Path("packed/wandapp/packed.json")
    return lambda: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def gguf(keep: int):
    """The first `keep` bytes of a GGUF file of one tensor."""

    def damage() -> None:
        from gguf import GGUFWriter

        writer = GGUFWriter("bad.gguf", "llama")
        writer.add_block_count(1)
        writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.truncate("bad.gguf", keep)

    return damage


def copy_of(originals: Path, place: Path, monkeypatch) -> Path:
    """A fresh copy of the originals in `place` as the current directory."""
    shutil.copytree(originals, place / "here")
    monkeypatch.chdir(place / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return place


def snapshot(place: Path) -> dict[str, int]:
    """Every path under `place`, with the time a file was last written; a lock that nobody holds is nothing."""
    paths = (path for path in sorted(place.rglob("*")) if path.name != "lock")
    return {str(path): path.lstat().st_mtime_ns * (not path.is_dir()) for path in paths}


def check_refusal(damage: Damage, command: str, said: str, place: Path, monkeypatch, capfd) -> None:
    """Exit code 2, one sentence that holds `said`, soon, without much memory, and nothing written."""
    from wandapp import cli

    damage()
    before, peak, start = snapshot(place), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    monkeypatch.setattr(sys, "argv", ["wandapp", *command.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    seconds, grown = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    text, errors = capfd.readouterr()
    assert caught.value.code == 2, errors
    assert text == "" and "Traceback" not in errors
    sentences = [line for line in errors.splitlines() if line.startswith("wandapp: ")]
    assert sentences == errors.splitlines()[-1:] and len(sentences[0]) < 700
    assert said in sentences[0], sentences[0]
    assert snapshot(place) == before
    assert grown < MIB_AT_MOST * 1024 and seconds < SECONDS_AT_MOST, (grown, seconds)
