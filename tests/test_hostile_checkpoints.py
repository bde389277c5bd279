"""A packed folder that means harm: one sentence about each kind of it, soon, and without much memory.

The first half damages one thing at a time; `test_packed.py` flips bytes at random. Kernels are fed through the same gate.
"""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp import WandappError, load_sparse
from wandapp.kernels.pack import Packed, pack, unpack
from wandapp.modules import SparseLinear
from wandapp.packing import pack_checkpoint

SECONDS = 10.0  # far more than any of these takes; a hang is what this catches


@pytest.fixture(scope="module")
def packed(pruned_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    pack_checkpoint(pruned_checkpoint("mixtral", "0.5")[1], folder)
    return folder


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


def manifest(edit):
    def attack(folder: Path) -> None:
        path = folder / "wandapp" / "packed.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return attack


def manifest_bytes(edit):
    def attack(folder: Path) -> None:
        path = folder / "wandapp" / "packed.json"
        path.write_bytes(edit(path.read_bytes()))

    return attack


def header(edit):
    """Edits the header of the second weight file, and leaves its bytes as they are."""

    def attack(folder: Path) -> None:
        path = weights(folder)
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        tensors = json.loads(content[8 : 8 + size])
        text = edit(tensors) or json.dumps(tensors).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return attack


def weights(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def bitmask(tensors: dict) -> dict:
    return next(info for name, info in tensors.items() if name.endswith(".bitmask"))


def empty_tensor(name: str, shape: list[int], dtype: str = "F32"):
    """A tensor of no bytes that the manifest knows."""

    def attack(folder: Path) -> None:
        header(lambda tensors: tensors.update({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}))(folder)
        manifest(lambda content: content["dense"].append(name))(folder)

    return attack


def instead(name: str | None, put):
    """Puts something else in the place of a file; None: the second weight file."""

    def attack(folder: Path) -> None:
        path = folder / name if name else weights(folder)
        path.unlink(missing_ok=True)
        put(path)

    return attack


def config(**fields):
    def attack(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return attack


FIRST = "model.layers.0.self_attn.q_proj"
ATTACKS = {
    "unknown version beside the known": manifest_bytes(
        lambda b: b.replace(b'"version": 1', b'"version": 1, "version": 9')
    ),
    "not utf-8": manifest_bytes(lambda b: b.replace(b"q_proj", b"q_\xff\xfe", 1)),
    "utf-16": manifest_bytes(lambda b: b.decode().encode("utf-16")),
    "lone surrogate": manifest_bytes(lambda b: b.replace(b"q_proj", b"q_\\ud800", 1)),
    "line end in a name": manifest_bytes(lambda b: b.replace(b"q_proj", b"q\\nproj", 1)),
    "terminal codes in a name": manifest_bytes(lambda b: b.replace(b"q_proj", b"q\\u001b[2J", 1)),
    "endless name": manifest(lambda m: m["linears"][0].update(name="x" * 10**6)),
    "NaN": manifest(lambda m: m["linears"][0].update(shape=[float("nan"), 64])),
    "fractions": manifest(lambda m: m["linears"][0].update(shape=[64.0, 64.0])),
    "truth values": manifest(lambda m: m["linears"][0].update(shape=[True, True])),
    "integer of 400 digits": manifest(lambda m: m["linears"][0].update(shape=[10**400, 64])),
    "expert beyond all": manifest(lambda m: m["linears"][0].update(index=10**30)),
    "pattern of 5000 digits": manifest(lambda m: m.update(pattern="1" * 5000 + ":" + "2" * 5000)),
    "pattern in other digits": manifest(lambda m: m.update(pattern="٢:٤")),
    "pattern is not a number": manifest(lambda m: m.update(pattern="nan")),
    "300000 tensors that are not there": manifest(lambda m: m["dense"].extend(f"x{i}" for i in range(300_000))),
    "every linear map 1000 times": manifest(lambda m: m.update(linears=m["linears"] * 1000)),
    "transposed": manifest(lambda m: m["linears"][1].update(transposed=True)),
    "linear map of another tensor": manifest(lambda m: m["linears"][0].update(tensor="lm_head.weight")),
    "manifest larger than memory": instead(
        "wandapp/packed.json", lambda path: (path.touch(), os.truncate(path, 2**40))
    ),
    "manifest is a pipe": instead("wandapp/packed.json", os.mkfifo),
    "manifest is a device": instead("wandapp/packed.json", lambda path: path.symlink_to("/dev/zero")),
    "manifest is a folder": instead("wandapp/packed.json", Path.mkdir),
    "weights are a pipe": instead(None, os.mkfifo),
    "weights are a device": instead(None, lambda path: path.symlink_to("/dev/zero")),
    "weights are a folder": instead(None, Path.mkdir),
    "weights are a link to themselves": instead(None, lambda path: path.symlink_to(path)),
    "weights are another file": instead(None, lambda path: path.symlink_to("/etc/passwd")),
    "weights of a tebibyte without content": lambda folder: os.truncate(weights(folder), 2**40),
    "header longer than the file": lambda folder: weights(folder).write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "header nested deep": header(lambda tensors: b"[" * 100_000),
    "overlapping tensors": header(lambda tensors: bitmask(tensors).update(data_offsets=[0, 512])),
    "negative size": header(lambda tensors: bitmask(tensors).update(shape=[-1, 8])),
    "size beyond 64 bits": header(lambda tensors: bitmask(tensors).update(shape=[2**63, 2])),
    "unknown type": header(lambda tensors: bitmask(tensors).update(dtype="F4")),
    "type of another size": header(lambda tensors: bitmask(tensors).update(dtype="F64")),
    "tensor of no bytes and 2^124 rows": empty_tensor("more.weight", [0, 2**62, 2**62]),
    "tensor of 70 dimensions": empty_tensor("more.weight", [0] * 70),
    "tensor of a type that is not read": empty_tensor("more.weight", [0], "F8_E5M2"),
    "line end in a tensor's name": empty_tensor("a\nb", [0]),
    "one weight under two names": empty_tensor("norm.weight", [0]),
    "an expert too many": empty_tensor("model.layers.0.block_sparse_moe.experts.4.w1.weight", [0]),
    "an expert far beyond": empty_tensor(f"model.layers.0.block_sparse_moe.experts.{10**20}.w1.weight", [0]),
    "an expert in both forms": empty_tensor("model.layers.0.mlp.experts.gate_up_proj", [0]),
    "config is a pipe": instead("config.json", os.mkfifo),
    "config nested deep": instead("config.json", lambda path: path.write_text('{"a":' * 50_000 + "1" + "}" * 50_000)),
    "config is a list": instead("config.json", lambda path: path.write_text("[]")),
    "config that asks for 10^9 labels": config(num_labels=10**9),
    "config that asks for 10^9 experts": config(num_local_experts=10**9),
    "config with a negative vocabulary": config(vocab_size=-5),
    "config of code elsewhere": config(model_type="other", auto_map={"AutoConfig": "evil.Config"}),
    "config with an unknown activation": config(hidden_act="os.system"),
    "config with experts that run otherwise": config(_experts_implementation="deepgemm_megamoe"),
    "config of another type": config(dtype="int8"),
    "generation config of nonsense": instead("generation_config.json", lambda path: path.write_text("[1]")),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_harm_is_refused_in_one_sentence(copy, attack):
    ATTACKS[attack](copy)
    start = time.monotonic()
    with pytest.raises(WandappError) as caught:
        load_sparse(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert time.monotonic() - start < SECONDS


def test_links_to_files_are_followed(copy, tmp_path):
    """Hub caches keep weights elsewhere and link to them."""
    path = weights(copy)
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    load_sparse(copy)


# The gate of the C++ kernels: they trust bitmask and row offsets, so nothing may reach them unchecked ------------------


@st.composite
def broken(draw) -> Packed:
    """A packed weight of which some bits, row offsets or sizes were changed."""
    structured = draw(st.booleans())
    weight = torch.zeros(5, 24)
    weight[:, 1::4] = 1.0
    weight[:, 2::4] = 2.0
    packed = pack(weight, n=2, m=4) if structured else pack(weight)
    for _ in range(draw(st.integers(1, 3))):
        packed.bitmask.view(-1)[draw(st.integers(0, 14))] ^= 1 << draw(st.integers(0, 7))
    if not structured and draw(st.booleans()):
        packed.row_offsets[draw(st.integers(0, 5))] = draw(st.integers(-(2**63), 2**63 - 1))
    if draw(st.booleans()):
        packed = packed._replace(values=packed.values.flatten()[: draw(st.integers(0, 59))])
    return packed


@settings(max_examples=150, deadline=None)
@given(packed=broken())
def test_no_broken_weight_reaches_a_kernel(packed):
    """Either it is refused, or its parts fit each other and give what they say."""
    try:
        module = SparseLinear(packed)
    except WandappError:
        with pytest.raises(WandappError):
            unpack(packed)
        return
    dense = unpack(packed)
    bits = torch.stack([packed.bitmask >> bit & 1 for bit in range(8)], dim=-1).flatten(1).bool()
    assert torch.equal(dense[bits], packed.values.flatten()) and not dense[~bits].any()
    for tokens in (1, 17):
        x = torch.randn(tokens, 24)
        assert torch.allclose(module(x), x @ dense.T, atol=1e-5)
