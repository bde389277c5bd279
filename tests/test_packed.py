"""Packed checkpoints: bit-exact round trips, small memory, and one sentence about every kind of damage."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wandapp import WandappError, load_model, load_sparse
from wandapp.packed import PackedCheckpoint
from wandapp.packing import pack_checkpoint, unpack_checkpoint
from wandapp.verify import verify_packed

MIB = 1 << 20


def same_bits(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
        if left[name].dim()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "1:4", "0.5"])
def test_round_trip_is_bit_exact(pruned_checkpoint, tmp_path, sparsity, dtype):
    model, folder = pruned_checkpoint("llama", sparsity, dtype)
    summary = pack_checkpoint(folder, tmp_path / "packed")
    restored = unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert same_bits(model.state_dict(), load_model(tmp_path / "dense").model.state_dict())
    assert summary.linears == 21 and vars(restored) == vars(summary)


def test_every_family_comes_back_with_its_tensor_names(pruned_checkpoint, tmp_path, tiny_family):
    _, folder = pruned_checkpoint(tiny_family, "2:4")
    pack_checkpoint(folder, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    restored = {}
    for path in (tmp_path / "dense").glob("*.safetensors"):
        restored |= load_file(path)
    assert same_bits(load_file(folder / "model.safetensors"), restored)


@pytest.mark.parametrize(("sparsity", "dtype", "share"), [("2:4", "bfloat16", 9 / 16), ("1:4", "float16", 5 / 16)])
def test_linear_maps_take_the_bytes_of_their_values_and_one_bit_per_weight(
    pruned_checkpoint, tmp_path, sparsity, dtype, share
):
    summary = pack_checkpoint(pruned_checkpoint("llama", sparsity, dtype)[1], tmp_path / "packed")
    assert summary.linear_packed_bytes == share * summary.linear_dense_bytes
    on_disk = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert summary.packed_bytes <= on_disk < summary.packed_bytes + 20_000  # headers


def test_companions_travel_both_ways(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4")
    pack_checkpoint(folder, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    for name in ("config.json", "tokenizer.json", "wandapp/recipe.yaml", "README.md"):
        assert (tmp_path / "dense" / name).read_bytes() == (folder / name).read_bytes()
    assert "wandapp unpack" in (tmp_path / "packed" / "README.md").read_text()
    assert not (tmp_path / "dense" / "wandapp" / "packed.json").exists()


def test_tied_embeddings_are_stored_once(pruned_checkpoint, tmp_path):
    model, folder = pruned_checkpoint("llama", "2:4", tie_word_embeddings=True)
    doubled = tmp_path / "doubled"  # some checkpoints hold both names
    shutil.copytree(folder, doubled)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, doubled / "model.safetensors", metadata={"format": "pt"})
    for source in (folder, doubled):
        pack_checkpoint(source, tmp_path / "packed", overwrite=True)
        assert "lm_head.weight" not in PackedCheckpoint(tmp_path / "packed").tensors
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert same_bits(model.state_dict(), load_model(tmp_path / "dense").model.state_dict())


def test_skipped_linear_maps_stay_dense(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4")
    pack_checkpoint(folder, tmp_path / "packed", sparsity="2:4", skip=("down_proj", r"layers\.1\."))
    names = PackedCheckpoint(tmp_path / "packed").linears
    assert len(names) == 12 and not any("down_proj" in name or "layers.1." in name for name in names)


def test_weights_that_break_the_pattern_are_named(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "4:8")
    with pytest.raises(WandappError, match=r"model\.layers\.0\.\S+_proj: row \d+, columns .* 2:4"):
        pack_checkpoint(folder, tmp_path / "packed", sparsity="2:4")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_packed_is_refused(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4")
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "wandapp" / "recipe.yaml").unlink()
    with pytest.raises(WandappError, match="give --sparsity"):
        pack_checkpoint(bare, tmp_path / "packed")
    (tmp_path / "packed").mkdir()
    with pytest.raises(WandappError, match="exists already"):
        pack_checkpoint(folder, tmp_path / "packed")
    with pytest.raises(WandappError, match="a packed checkpoint; read it with"):
        load_model(_packed(folder, tmp_path / "again"))


def test_verify_reads_the_packed_form(pruned_checkpoint, tmp_path):
    packed = _packed(pruned_checkpoint("gpt2", "4:8")[1], tmp_path / "packed")
    assert verify_packed(packed, "4:8").ok
    report = verify_packed(packed, "2:4")
    assert not report.ok and "transformer.h.0" in report.first_offence


def _packed(folder: Path, out: Path) -> Path:
    pack_checkpoint(folder, out)
    return out


_PACK = """
import resource, sys
from wandapp import load_sparse, save_sparse
from wandapp.packing import pack_checkpoint, unpack_checkpoint
from wandapp.skeleton import skeleton
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
folder = sys.argv[1]
skeleton(folder)
before = peak()
pack_checkpoint(folder, folder + "-packed", sparsity="2:4")
packed = peak()
unpack_checkpoint(folder + "-packed", folder + "-dense")
unpacked = peak()
model = load_sparse(folder + "-packed")
loaded = peak()
save_sparse(model, folder + "-again")
save_sparse(model, folder + "-back", packed=False)
print(packed - before, unpacked - before, loaded - before, peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_below_two_blocks(tiny_model, tmp_path):
    """A checkpoint of 350 MB (packed 186), whose blocks take 29 MB each; a loaded model is packed and never dense."""
    width = 1024
    model, config = tiny_model("llama", num_key_value_heads=4)
    config.hidden_size = config.intermediate_size = width
    config.num_hidden_layers, config.head_dim = 12, width // 4
    config.save_pretrained(tmp_path / "large")
    weight = torch.zeros(width, width)
    weight[:, ::2] = 1.0
    tensors = {
        name.replace("layers.0", f"layers.{index}"): weight.clone() if "_proj" in name else torch.ones(width)
        for name in model.state_dict()
        if "layers.0" in name
        for index in range(12)
    }
    tensors |= {"model.norm.weight": torch.ones(width)}
    tensors |= {name: torch.ones(300, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", _PACK, str(tmp_path / "large")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    packing, unpacking, loading, saving = map(int, run.stdout.split())
    assert packing < 58 and unpacking < 58
    assert loading < 186 + 58 and saving < 186 + 2 * 58
    shutil.rmtree(tmp_path)


# The hostile reader -------------------------------------------------------------------------------------------------


def read_everything(folder: Path) -> None:
    checkpoint = PackedCheckpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read_tensor(name)


@pytest.fixture(scope="module", params=["2:4", "0.5"])
def packed(request, pruned_checkpoint, tmp_path_factory) -> Path:
    return _packed(pruned_checkpoint("llama", request.param)[1], tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


Q_PROJ = "model.layers.0.self_attn.q_proj"


def edit_manifest(folder: Path, edit) -> None:
    path = folder / "wandapp" / "packed.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def edit_tensors(folder: Path, edit) -> None:
    """Edits the tensors of the file that holds the first block."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if f"{Q_PROJ}.values" not in file.keys():
                continue
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)


def first_linear(manifest: dict) -> dict:
    return next(linear for linear in manifest["linears"] if linear["name"] == Q_PROJ)


MANIFEST_DAMAGE = {
    "version": (lambda m: m.update(version=3), "version: input should be 1 or 2"),
    "no version": (lambda m: m.pop("version"), "version: field required"),
    "format": (lambda m: m.update(format="other"), "format: input should be 'wandapp-packed'"),
    "unknown key": (lambda m: m.update(extra=1), "extra: extra inputs"),
    "pattern": (lambda m: m.update(pattern="7"), "sparsity must lie"),
    "other pattern": (lambda m: m.update(pattern="1:4"), r"must be|lacks|unnamed"),
    "shape bomb": (lambda m: first_linear(m).update(shape=[2**40, 2**40]), r"must be .* got"),
    "empty shape": (lambda m: first_linear(m).update(shape=[0, 2**60]), "both must be positive"),
    "negative shape": (lambda m: first_linear(m).update(shape=[-64, -64]), "both must be positive"),
    "other shape": (lambda m: first_linear(m).update(shape=[32, 128]), r"must be .* got"),
    "dtype": (lambda m: first_linear(m).update(dtype="bfloat16"), "must be bfloat16"),
    "unknown dtype": (lambda m: first_linear(m).update(dtype="int4"), r"linears\.\d+\.dtype"),
    "lone expert": (lambda m: first_linear(m).update(index=3), "do not make one tensor"),
    "path": (lambda m: m["files"].append("../model.safetensors"), "no file of this folder"),
    "absolute path": (lambda m: m["files"].append("/etc/passwd"), "no file of this folder"),
    "file twice": (lambda m: m["files"].append(m["files"][0]), "is also in"),
    "file left out": (lambda m: m["files"].pop(), "lacks"),
    "linear twice": (lambda m: m["linears"].append(m["linears"][0]), "names a tensor twice"),
    "linear left out": (lambda m: m["linears"].pop(), "unnamed"),
    "dense twice": (lambda m: m["dense"].append(m["dense"][0]), "names a tensor twice"),
    "dense of a linear": (lambda m: m["dense"].append(f"{Q_PROJ}.weight"), "lacks"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_damaged_manifest_is_refused_in_one_sentence(copy, damage):
    edit, said = MANIFEST_DAMAGE[damage]
    edit_manifest(copy, edit)
    with pytest.raises(WandappError, match=said) as caught:
        read_everything(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "[]", '{"version": 1' + "0" * 5000 + "}", "\x00"])
def test_manifest_that_is_no_manifest(copy, text):
    (copy / "wandapp" / "packed.json").write_text(text)
    with pytest.raises(WandappError) as caught:
        PackedCheckpoint(copy)
    assert "\n" not in str(caught.value)


def _flip_bit(tensors):
    tensors[f"{Q_PROJ}.bitmask"][3, 2] ^= 0x10


def _move_offsets(tensors):
    if f"{Q_PROJ}.row_offsets" in tensors:
        tensors[f"{Q_PROJ}.row_offsets"][5] += 2**40
    else:
        _flip_bit(tensors)


def _cut_values(tensors):
    values = tensors[f"{Q_PROJ}.values"]
    tensors[f"{Q_PROJ}.values"] = values[:-1].clone()


def _change_type(tensors):
    tensors[f"{Q_PROJ}.bitmask"] = tensors[f"{Q_PROJ}.bitmask"].to(torch.int64)


@pytest.mark.parametrize("edit", [_flip_bit, _move_offsets, _cut_values, _change_type])
def test_parts_that_do_not_fit_each_other(copy, edit):
    edit_tensors(copy, edit)
    with pytest.raises(WandappError, match=r"bitmask|row offsets|must be") as caught:
        read_everything(copy)
    assert Q_PROJ in str(caught.value) and "\n" not in str(caught.value)


def test_groups_with_the_right_total_but_the_wrong_place(pruned_checkpoint, tmp_path):
    """Counting bits of a whole row would not see this, and a 2:4 kernel would read its neighbour's values."""
    copy = _packed(pruned_checkpoint("llama", "2:4")[1], tmp_path / "copy")
    edit_tensors(copy, lambda tensors: tensors[f"{Q_PROJ}.bitmask"][0].copy_(torch.tensor([0x17] * 8).byte()))
    with pytest.raises(WandappError, match="does not keep 2 of every 4 columns"):
        read_everything(copy)


@pytest.mark.parametrize(("cols", "n", "m"), [(12, 2, 4), (24, 3, 12), (32, 4, 16), (9, 1, 3), (8, 1, 2)])
def test_bits_of_groups_of_any_width(cols, n, m):
    from wandapp.kernels.pack import bitmask_fault, pack

    weight = torch.zeros(5, cols)
    weight.view(5, -1, m)[..., :n] = 1.0
    packed = pack(weight, n=n, m=m)
    assert bitmask_fault(packed) is None
    for column in range(packed.bitmask.shape[1] * 8):
        packed.bitmask[4, column // 8] ^= 1 << column % 8
        assert bitmask_fault(packed)
        packed.bitmask[4, column // 8] ^= 1 << column % 8


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file_is_refused(copy, keep):
    path = sorted(copy.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WandappError, match="corrupt or incomplete"):
        read_everything(copy)


def test_missing_file_is_refused(copy):
    sorted(copy.glob("*.safetensors"))[0].unlink()
    with pytest.raises(WandappError, match="no such file"):
        read_everything(copy)


def test_config_that_asks_for_more_than_the_files_hold(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    for field, value in (("num_hidden_layers", 10**9), ("hidden_size", 2**62), ("intermediate_size", 2**30)):
        (copy / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(WandappError):
            verify_packed(copy, "0.5")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_crash_the_reader(packed, fuzzed, data):
    fuzz(packed, fuzzed, data)


def fuzz(packed: Path, fuzzed: Path, data) -> None:
    """Either it reads, or it says why not in one sentence; and it never takes much memory."""
    others = packed / "wandapp/packed.json", packed / "config.json"
    files = sorted(path.relative_to(packed) for path in [*packed.glob("*.safetensors"), *others])
    name = data.draw(st.sampled_from(files))
    content = bytearray((packed / name).read_bytes())
    header = min(len(content), 4000)  # most of the decisions are made there
    place = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for position, byte in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=4)):
        content[position] = byte
    (fuzzed / name).write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_everything(fuzzed)
        load_sparse(fuzzed)
    except WandappError as error:
        assert "\n" not in str(error)
    finally:
        shutil.copyfile(packed / name, fuzzed / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * MIB // 1024


@pytest.fixture(scope="module")
def fuzzed(packed, tmp_path_factory) -> Path:
    return shutil.copytree(packed, tmp_path_factory.mktemp("fuzz") / "model")


# int8 storage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["2:4", "0.5"])
def rounded(request, pruned_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "model"
    pack_checkpoint(pruned_checkpoint("llama", request.param, "bfloat16")[1], out, storage="int8")
    return out


def test_int8_restores_the_rounded_weights(pruned_checkpoint, tmp_path):
    model, folder = pruned_checkpoint("gpt2", "2:4", "float16")  # transposed weights
    summary = pack_checkpoint(folder, tmp_path / "packed", storage="int8")
    assert 0 < summary.mean_error <= summary.worst_error < 0.01 and summary.worst_linear in dict(model.named_modules())
    restored = unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert restored.storage == "int8" and restored.linear_packed_bytes == summary.linear_packed_bytes
    assert verify_packed(tmp_path / "packed", "2:4").ok
    dense = load_model(tmp_path / "dense").model.state_dict()
    for name, weight in model.state_dict().items():
        if ".c_fc.weight" in name:  # [in, out], so a row of the packed form is a column here
            scale = weight.float().abs().amax(0) / 127
            assert (dense[name].float() - weight.float()).abs().le(0.5 * scale + weight.abs() * 2**-10).all()
            assert ((dense[name] == 0) | (weight != 0)).all() and dense[name].dtype == torch.float16


def test_only_int8_needs_format_version_2(rounded, packed):
    for folder, version in ((rounded, 2), (packed, 1)):
        manifest = json.loads((folder / "wandapp" / "packed.json").read_text())
        assert manifest["version"] == version and ("storage" in manifest["linears"][0]) == (version == 2)


def _scales(value):
    return lambda tensors: tensors[f"{Q_PROJ}.scale"].__setitem__(3, value)


INT8_DAMAGE = {
    "negative scale": (_scales(-1.0), "scale is negative or not finite"),
    "nan scale": (_scales(float("nan")), "scale is negative or not finite"),
    "infinite scale": (_scales(float("inf")), "scale is negative or not finite"),
    "-128": (lambda t: t[f"{Q_PROJ}.values"].flatten().__setitem__(7, -128), "a value is -128"),
    "short scale": (
        lambda t: t.update({f"{Q_PROJ}.scale": t[f"{Q_PROJ}.scale"][:-1].clone()}),
        r"scale must be float32 \[",
    ),
    "half scale": (lambda t: t.update({f"{Q_PROJ}.scale": t[f"{Q_PROJ}.scale"].half()}), "scale must be float32"),
    "no scale": (lambda t: t.pop(f"{Q_PROJ}.scale"), "lacks"),
    "float values": (lambda t: t.update({f"{Q_PROJ}.values": t[f"{Q_PROJ}.values"].float()}), "must be int8"),
}


@pytest.mark.parametrize("damage", INT8_DAMAGE)
def test_damaged_int8_parts_are_refused(rounded, tmp_path, damage):
    edit, said = INT8_DAMAGE[damage]
    copy = shutil.copytree(rounded, tmp_path / "copy")
    edit_tensors(copy, edit)
    with pytest.raises(WandappError, match=said) as caught:
        read_everything(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(version=1), "storage int8 needs version 2"),
        (lambda m: first_linear(m).update(storage="int4"), r"linears\.\d+\.storage"),
        (lambda m: first_linear(m).pop("storage"), r"must be bfloat16|unnamed"),
    ],
)
def test_damaged_int8_manifest_is_refused(rounded, tmp_path, edit, said):
    copy = shutil.copytree(rounded, tmp_path / "copy")
    edit_manifest(copy, edit)
    with pytest.raises(WandappError, match=said):
        read_everything(copy)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_of_int8_files_never_crash_the_reader(rounded, fuzzed_int8, data):
    fuzz(rounded, fuzzed_int8, data)


@pytest.fixture(scope="module")
def fuzzed_int8(rounded, tmp_path_factory) -> Path:
    return shutil.copytree(rounded, tmp_path_factory.mktemp("fuzz") / "model")


# The command line ---------------------------------------------------------------------------------------------------


def call(monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command's entry point, in this process."""
    from wandapp import cli

    monkeypatch.setattr(sys, "argv", ["wandapp", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capfd.readouterr()


def test_commands(pruned_checkpoint, tmp_path, monkeypatch, capfd):
    _, folder = pruned_checkpoint("llama", "2:4")
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    code, text, shown = call(monkeypatch, capfd, "pack", folder, packed, "--json")
    assert code == 0 and "MiB packed (53.12%)" in shown
    sizes = json.loads(text)
    assert sizes["linear_packed_bytes"] == 17 / 32 * sizes["linear_dense_bytes"]
    assert call(monkeypatch, capfd, "verify", packed)[1] == "ok: 21 linear maps hold 2:4 (sparsity 0.5000)\n"
    code, _, error = call(monkeypatch, capfd, "pack", folder, packed)
    assert code == 2 and "exists already" in error
    code, text, shown = call(monkeypatch, capfd, "pack", folder, tmp_path / "int8", "--storage", "int8", "--json")
    assert code == 0 and "rounded to int8" in shown and json.loads(text)["worst_error"] < 0.01
    code, _, shown = call(monkeypatch, capfd, "unpack", tmp_path / "int8", tmp_path / "rounded")
    assert code == 0 and "int8 storage is lossy" in shown
    code, _, error = call(monkeypatch, capfd, "pack", folder, tmp_path / "other", "--storage", "int9")
    assert code == 2 and "did you mean 'int8'?" in error
    assert call(monkeypatch, capfd, "pack", folder, packed, "--overwrite")[0] == 0
    assert call(monkeypatch, capfd, "unpack", packed, dense)[0] == 0
    assert call(monkeypatch, capfd, "verify", dense)[0] == 0


def test_prune_packs_in_one_go(pruned_checkpoint, tmp_path, monkeypatch, capfd):
    _, folder = pruned_checkpoint("gpt2", "0.5")  # tied embeddings, transposed weights
    options = "--method magnitude --sparsity 2:4 --calibration pydoc --samples 2 --seq-len 16 --pack --json".split()
    code, text, error = call(monkeypatch, capfd, "prune", folder, "--out", tmp_path / "out", *options)
    assert code == 0, error
    assert json.loads(text)["packed"]["out"] == str(tmp_path / "out-packed")
    assert verify_packed(tmp_path / "out-packed", "2:4").ok
    shutil.rmtree(tmp_path / "out")
    code, _, error = call(monkeypatch, capfd, "prune", folder, "--out", tmp_path / "out", *options)
    assert code == 2 and "out-packed: the output folder exists already" in error
    assert not (tmp_path / "out").exists()


def killed_after(files: int, work, *arguments) -> None:
    """Runs packing or unpacking in a fork that kills itself when so many files are written."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # the parent's threads are not here
        work(*arguments, on_progress=lambda done, _: done == files and os.kill(os.getpid(), signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_pack_leaves_nothing_that_looks_complete(tmp_path, pruned_checkpoint):
    _, folder = pruned_checkpoint("llama", "2:4")
    killed_after(2, pack_checkpoint, folder, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed.partial"]
    pack_checkpoint(folder, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    read_everything(tmp_path / "packed")


def test_what_a_killed_unpack_left_does_not_stop_the_next(tmp_path, pruned_checkpoint):
    """Nor where the pruning run, whose files come along, could have been resumed."""
    shutil.copytree(pruned_checkpoint("llama", "2:4")[1], tmp_path / "pruned")
    (tmp_path / "pruned" / "wandapp" / "run.json").write_text("{}")
    _packed(tmp_path / "pruned", tmp_path / "packed")
    killed_after(1, unpack_checkpoint, tmp_path / "packed", tmp_path / "dense")
    assert len(list((tmp_path / "dense.partial").glob("model-*"))) == 1
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert load_model(tmp_path / "dense") and not (tmp_path / "dense.partial").exists()
