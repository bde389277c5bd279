"""Fuzzed files: whatever is in one, its reader reads it or says in one sentence why not, and takes little memory.

Packed headers and manifests have their fuzzer in test_packed.py. More examples: WANDAPP_FUZZ=5000 pytest tests/test_fuzz_input.py
"""

import json
import os
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wandapp import PruneConfig, WandappError, load_model, save_pruned
from wandapp.calibration import load_calibration
from wandapp.manifest import Manifest
from wandapp.sweep import Sweep
from wandapp.weight_files import checkpoint_tensors

MANY = int(os.environ.get("WANDAPP_FUZZ", "0"))


def fuzz(examples: int):
    """Settings of one fuzzer: the same examples in every run of the suite, more and other ones where asked for."""
    return settings(
        max_examples=MANY or examples,
        derandomize=not MANY,
        database=None,
        deadline=5000,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def one_sentence():
    """Nothing but a WandappError of one line, and not a long one, may come out."""
    try:
        yield
    except WandappError as error:
        assert "\n" not in str(error) and 10 < len(str(error)) < 1200


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "tiny"
    save_pruned(tiny_model("llama", num_hidden_layers=2)[0], tiny_tokenizer(), folder, files={})
    return folder


@pytest.fixture(scope="module")
def copy(checkpoint, tmp_path_factory) -> Path:
    return shutil.copytree(checkpoint, tmp_path_factory.mktemp("fuzz") / "copy")


@contextmanager
def instead(path: Path, content: bytes):
    """`path` with other content for a while."""
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**31, 2**63, 2**70, -(2**40), 10**9, 10**400]), st.floats(width=32)
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=12), st.sampled_from(["2:4", "wanda", "\0", "/"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` with a few bytes changed, cut, or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        else:
            data[place:place] = draw(
                st.sampled_from([b"\0", b"[", b"{", b'"', b": ", b"\n", b"&a ", b"*a", b"!!", b"9" * 30])
            )
    return bytes(data)


RECIPE = b"model: tiny\nmethod: wanda++\nsparsity: 2:4\nskip: [a, 'b']\nsamples: 4\nro_lr: 1e-3\nseed: 0\n"
SWEEP = b"out: runs\nmodels: [a, b]\npatterns: ['2:4']\nseeds: [0, 1]\nexclude: [{seed: 1}]\nevaluate: {text: pydoc}\n"
FIELDS = sorted(PruneConfig.model_fields)


@fuzz(50)
@given(content=damaged(RECIPE) | st.binary(max_size=80) | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_recipes(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode())
    with one_sentence():
        assert PruneConfig.from_yaml(path).resolved().pattern


SWEEP_KEYS = ["out", "models", "patterns", "methods", "seeds", "exclude", "evaluate", "skip", "samples", "alpha"]


@fuzz(30)
@given(content=damaged(SWEEP) | st.dictionaries(st.sampled_from(SWEEP_KEYS), VALUES, max_size=6))
def test_sweeps(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode())
    with one_sentence():
        sweep = Sweep(path)
        assert len({job.name for job in sweep.jobs}) == len(sweep.jobs)


NAMES = ["model.norm.weight", "lm_head.weight", "ghost", "", "a/b", "x" * 300]
PLACES = [
    "model.safetensors",
    "../tiny/model.safetensors",
    "/etc/passwd",
    "",
    ".",
    "gone.safetensors",
    "a\0.safetensors",
]


@fuzz(30)
@given(
    content=damaged(json.dumps({"metadata": {}, "weight_map": {NAMES[0]: PLACES[0]}}).encode())
    | st.fixed_dictionaries({"weight_map": st.dictionaries(st.sampled_from(NAMES), st.sampled_from(PLACES) | VALUES)})
)
def test_safetensors_index(content, copy):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with instead(copy / "model.safetensors.index.json", data), one_sentence():
        for info in checkpoint_tensors(copy).infos.values():
            assert info.path.parent == copy


@fuzz(25)
@given(data=st.data())
def test_safetensors_headers(data, checkpoint, copy):
    content = (checkpoint / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = data.draw(damaged(content[8 : 8 + length]))
    claimed = data.draw(st.sampled_from([len(header), length, 0, 2**40, 2**63]))
    with (
        instead(copy / "model.safetensors", struct.pack("<Q", claimed) + header + content[8 + length :]),
        one_sentence(),
    ):
        load_model(copy)


@fuzz(20)
@given(data=st.data())
def test_model_configurations(data, checkpoint, copy):
    config = json.loads((checkpoint / "config.json").read_text())
    keys = st.sampled_from(sorted(config))
    changed = config | data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    with instead(copy / "config.json", json.dumps(changed).encode()), one_sentence():
        load_model(copy)


RUN = Manifest(
    blocks=3,
    recipe={"method": "wanda", "sparsity": "2:4"},
    recipe_sha256="0" * 64,
    source=[],
    calibration_sha256="1" * 64,
    batch_size=4,
    ranks=1,
    threads=1,
    device="cpu",
    backend="cpu",
    dtype="float32",
    versions={"torch": "2"},
)


@fuzz(30)
@given(data=st.data())
def test_run_manifests(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "out.partial" / "wandapp" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(Manifest.model_fields)), VALUES, max_size=2))
    changed = json.dumps(json.loads(RUN.model_dump_json()) | fields).encode()
    path.write_bytes(data.draw(st.just(changed) | damaged(changed)))
    with one_sentence():
        earlier = Manifest.read(path)
        assert 1 <= earlier.threads <= 4096
        RUN.require_same(earlier, path.parents[1])


JSONL = b'{"text": "The sea is deep."}\n{"text": "The sky is \\u00e9 high.", "n": 1}\n' * 3


@fuzz(25)
@given(content=damaged(JSONL) | st.lists(VALUES, max_size=4))
def test_lines_of_text(content, copy, tiny_tokenizer):
    path = copy.parent / "text.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
    with one_sentence():
        assert load_calibration(path, tiny_tokenizer(), samples=2, seq_len=4).tokens.shape == (2, 4)


@fuzz(25)
@given(data=st.data())
def test_files_of_token_ids(data, copy):
    path = copy.parent / "ids.npy"
    np.save(path, np.arange(32).reshape(4, 8))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with one_sentence():
        assert load_calibration(path, None).tokens.ndim == 2
