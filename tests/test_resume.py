"""A run that was stopped anywhere goes on and gives the same bits; what must not be continued is refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_gguf

from wandapp import shards
from wandapp.config import PruneConfig
from wandapp.errors import Interrupted, WandappError
from wandapp.job import prune_checkpoint
from wandapp.models import load_model, save_pruned
from wandapp.output import locked, partial_of
from wandapp.pipeline import prune
from wandapp.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "magnitude": {"sparsity": "0.5"},
    "wanda-cumulative": {"sparsity": "0.5"},
    "sparsegpt": {"sparsity": "4:8"},
    "admm": {"sparsity": "0.5", "allocate": "error"},
    "gblm": {},
    "wanda++": {"ro_rounds": 2, "ro_samples": 2},
    "sparsegpt+ro": {"ro_rounds": 1, "ro_samples": 2},
    "wanda+reconstruct": {
        "reconstruct_passes": 2,
        "reconstruct_target": "dense-path",
        "activations": "disk",
    },
}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory):
    """checkpoint(family) -> folder of a tiny bf16 model."""
    root = tmp_path_factory.mktemp("dense")

    def make(family: str) -> Path:
        if not (root / family).exists():
            save_pruned(tiny_model(family)[0].to(torch.bfloat16), tiny_tokenizer(), root / family, files={})
        return root / family

    return make


@pytest.fixture
def recipe(checkpoint, tmp_path):
    """recipe(family="llama", **options) -> PruneConfig with the output tmp_path / "out"."""
    tokens = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")

    def make(family: str = "llama", **options) -> PruneConfig:
        given = {
            "model": str(checkpoint(family)),
            "out": str(tmp_path / "out"),
            "calibration": str(tmp_path / "tokens.safetensors"),
            "batch_size": 2,
        }
        return PruneConfig(**given | options)

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def in_memory(config: PruneConfig, folder: Path) -> dict[str, torch.Tensor]:
    """What `wandapp.prune` and `save_pruned` make of the same recipe, without a stop."""
    model, tokenizer = load_model(config.model)
    prune(model, tokenizer, config=config)
    save_pruned(model, tokenizer, folder, files={})
    return tensors(folder)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def stop_after(blocks: int):
    def on_progress(progress):
        if progress.block == blocks:
            raise Interrupted("stopped")

    return on_progress


def interrupt(config: PruneConfig, blocks: int) -> str:
    """Runs until that many blocks are done; what the run said when it was stopped."""
    with pytest.raises(Interrupted) as stopped:
        prune_checkpoint(config, on_progress=stop_after(blocks))
    assert not Path(config.out).exists()
    return str(stopped.value)


def check_family(config: PruneConfig, tmp_path: Path) -> None:
    interrupt(config, 2)
    prune_checkpoint(config, resume=True)
    assert_same(tensors(config.out), in_memory(config, tmp_path / "reference"))
    names = {path.name for path in Path(config.out).iterdir()}
    assert {path.name for path in (tmp_path / "reference").iterdir()} - names == {"model.safetensors"}
    assert (Path(config.out) / "config.json").read_text() == (tmp_path / "reference/config.json").read_text()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_streamed_stopped_and_resumed_equals_in_memory(family, recipe, tmp_path):
    check_family(recipe(family, stream=True, activations="disk"), tmp_path)


@pytest.mark.slow
def test_every_family_streamed_stopped_and_resumed_equals_in_memory(tiny_family, recipe, tmp_path):
    check_family(recipe(tiny_family, method="wanda+ro", ro_rounds=1, ro_samples=2, stream=True), tmp_path)


def test_stopped_and_resumed_a_permuted_run_writes_the_same_bytes(recipe, tmp_path):
    """Not the same tensors alone: no time of day or of work gets into the files."""
    interrupt(recipe(permute=True), 2)
    prune_checkpoint(recipe(permute=True), resume=True)
    prune_checkpoint(recipe(permute=True, out=str(tmp_path / "other")))
    for path in Path(tmp_path / "other").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_samples_that_the_model_wrote_are_not_written_again(recipe, tmp_path, monkeypatch):
    config = recipe(self_samples=3)
    interrupt(config, 2)
    with monkeypatch.context() as patch:
        patch.setattr("wandapp.calibration._continue", None)
        report = prune_checkpoint(config, resume=True)
    assert report.samples == 7 and not (Path(config.out) / "wandapp" / "scratch").exists()
    fresh = prune_checkpoint(recipe(self_samples=3, out=str(tmp_path / "other")))
    assert (report.calibration, report.calibration_sha256) == (fresh.calibration, fresh.calibration_sha256)
    for path in Path(tmp_path / "other").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_samples_that_another_model_wrote_are_not_taken_over(recipe, tmp_path, tiny_model, tiny_tokenizer):
    """A run that was killed before its first block was finished left them."""
    save_pruned(tiny_model("llama", seed=7)[0].to(torch.bfloat16), tiny_tokenizer(), tmp_path / "another", files={})
    other = recipe(self_samples=2, seed=5, model=str(tmp_path / "another"))
    if not (child := os.fork()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wandapp.pipeline._prune_block", lambda *_: os._exit(9))
            prune_checkpoint(recipe(self_samples=3))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list(partial_of(other.out).rglob("own-text/*"))
    resumed = prune_checkpoint(other, resume=True)
    fresh = prune_checkpoint(other.model_copy(update={"out": str(tmp_path / "fresh")}))
    assert (resumed.samples, resumed.calibration_sha256) == (6, fresh.calibration_sha256)


def test_a_streamed_model_writes_nothing_and_says_so(recipe, monkeypatch):
    monkeypatch.setattr("wandapp.job.free_bytes", lambda: 1)
    said = []
    report = prune_checkpoint(recipe(self_samples=3, tune_passes=1), say=said.append)
    assert report.samples == 4 and report.self_samples == 0 and not report.tuning
    without = "is streamed, so this run is without --self-samples 3 and --tune-passes 1"
    assert sum(without in line for line in report.warnings) == 1


def test_a_checkpoint_that_is_pruned_already_is_said_to_be(recipe, tmp_path):
    first = recipe()
    assert not prune_checkpoint(first).warnings
    report = prune_checkpoint(recipe(model=first.out, out=str(tmp_path / "again")))
    assert any("is itself pruned" in line for line in report.warnings)


@pytest.mark.parametrize("first", [1, 2**62])
def test_a_run_that_goes_on_streams_as_before_whatever_memory_is_free(recipe, monkeypatch, first):
    config, free = recipe(self_samples=3), [first]
    monkeypatch.setattr("wandapp.job.free_bytes", lambda: free[0])
    interrupt(config, 2)
    free[0] = 2**62 if first == 1 else 1
    report = prune_checkpoint(config, resume=True)
    assert report.self_samples == (0 if first == 1 else 3)
    said = []
    prune_checkpoint(config, resume=True, say=said.append)
    assert "is complete; there is nothing to resume" in said[-1]


def test_calibration_that_the_model_wrote_is_not_written_again(recipe, monkeypatch):
    config = recipe(calibration="self", samples=4, seq_len=24)
    interrupt(config, 1)
    monkeypatch.setattr("wandapp.calibration._continue", None)
    report = prune_checkpoint(config, resume=True)
    assert (report.samples, report.self_samples) == (4, 4) and report.calibration.startswith("self: 4 samples")


def test_a_block_is_not_pruned_anew_behind_tuned_ones(recipe, tmp_path, monkeypatch):
    tokens = torch.randint(0, 250, (48, 24), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "more.safetensors")
    options = dict(calibration=str(tmp_path / "more.safetensors"), tune_passes=2, tune_lr=0.003, dtype="float32")
    config = recipe(**options)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "finish", lambda *_: (_ for _ in ()).throw(Interrupted("stopped")))
        prune_checkpoint(config)
    next(partial_of(config.out).glob("model-00002-of-*")).unlink()
    with pytest.raises(WandappError, match="layers.0 is tuned already, so block 1, .*; delete .* to start over"):
        prune_checkpoint(config, resume=True)


@pytest.mark.parametrize("moment", ["while blocks are pruned", "before tuning", "while it is written back"])
def test_a_tuned_run_stopped_and_resumed_writes_the_same_bytes(moment, recipe, tmp_path, monkeypatch):
    tokens = torch.randint(0, 250, (48, 24), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "more.safetensors")
    options = dict(calibration=str(tmp_path / "more.safetensors"), tune_passes=2, tune_lr=0.003, dtype="float32")
    config, keep = recipe(**options), RunFolder.keep

    def stop_in_the_middle(self, index, tensors, record):
        if record.tuned and index == 1:
            raise Interrupted("stopped")
        keep(self, index, tensors, record)

    if moment == "while it is written back":
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="3 of 3 blocks are finished"):
            patch.setattr(RunFolder, "keep", stop_in_the_middle)
            prune_checkpoint(config)
        monkeypatch.setattr("wandapp.pipeline.tune", None)  # what was learnt is read
    else:
        interrupt(config, 2 if moment == "while blocks are pruned" else 3)
    resumed = prune_checkpoint(config, resume=True)
    monkeypatch.undo()
    whole = prune_checkpoint(recipe(**options | {"out": str(tmp_path / "other")}))
    assert resumed.tuning == whole.tuning and whole.tuning["divergence_after"] < whole.tuning["divergence_before"]
    for path in Path(tmp_path / "other").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied, tiny_model, recipe, tmp_path):
    save_pruned(tiny_model("llama", tie_word_embeddings=tied)[0], None, tmp_path / "dense", files={})
    config = recipe(model=str(tmp_path / "dense"), stream=True)
    prune_checkpoint(config)
    found = tensors(config.out)
    assert ("lm_head.weight" in found) != tied
    assert_same(found, in_memory(config, tmp_path / "reference"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ("gblm", "wanda++", "wanda+reconstruct") else SLOW) for m in METHODS]
)
def test_every_method_resumes_to_the_same_bits_streamed_or_not(method, recipe, tmp_path):
    config = recipe(method=method, **METHODS[method])
    interrupt(config, 1)
    streamed = config.model_copy(update={"stream": True})
    with pytest.raises(Interrupted):
        prune_checkpoint(streamed, resume=True, on_progress=stop_after(2))  # goes on streamed ...
    prune_checkpoint(config, resume=True)  # ... and in memory again
    assert_same(tensors(config.out), in_memory(config, tmp_path / "reference"))


def test_gguf_streamed_stopped_and_resumed_equals_in_memory(tiny_model, recipe, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama")[0])
    config = recipe(model=str(tmp_path / "tiny.gguf"), stream=True)
    interrupt(config, 2)
    prune_checkpoint(config, resume=True)
    assert_same(tensors(config.out), in_memory(config, tmp_path / "reference"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (Path(config.out) / name).read_text() == (tmp_path / "reference" / name).read_text(), name
    assert not (Path(config.out) / "wandapp" / "scratch").exists()


def test_report_of_a_resumed_run_holds_every_block_and_warning(recipe):
    config = recipe(method="wanda+ro", ro_rounds=1, ro_samples=2, ro_lr=1.0, ro_lr_unit="absolute", stream=True)
    interrupt(config, 2)
    report = prune_checkpoint(config, resume=True)
    assert [block.name for block in report.blocks] == [f"model.layers.{i}" for i in range(3)]
    assert len(report.warnings) == 3 and report.sparsity == 0.5


def test_stopped_run_says_how_to_go_on_and_refuses_to_be_forgotten(recipe):
    config = recipe()
    said = interrupt(config, 2)
    partial = partial_of(config.out)
    assert f"2 of 3 blocks are finished and kept; continue with: wandapp prune --config {partial}" in said
    before = sorted(partial.iterdir())
    with pytest.raises(WandappError, match="--resume, or delete that folder"):
        prune_checkpoint(config)
    with pytest.raises(WandappError, match="--resume, or delete that folder"):
        prune_checkpoint(config.model_copy(update={"overwrite": True}))
    assert sorted(partial.iterdir()) == before
    again = PruneConfig.from_yaml(partial / "wandapp" / "recipe.yaml")
    prune_checkpoint(again, resume=True)
    assert not partial.exists() and (Path(config.out) / "config.json").is_file()


def test_run_stopped_before_a_block_leaves_nothing(recipe, monkeypatch):
    config = recipe()
    monkeypatch.setattr("wandapp.pipeline._calibrate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM; no block was finished"):
        prune_checkpoint(config)
    assert not partial_of(config.out).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_exits_with_3_and_prints_the_command(number, recipe, monkeypatch, capfd):
    from wandapp import cli, pipeline

    config = recipe()
    monkeypatch.setattr(pipeline, "_progress", lambda *_: os.kill(os.getpid(), number))
    arguments = ["prune", config.model, "--out", config.out, "--calibration", config.calibration]
    monkeypatch.setattr(sys, "argv", ["wandapp", *arguments])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 3 and signal.getsignal(number) is before
    assert capfd.readouterr().err.rstrip().endswith(f"{partial_of(config.out)}/wandapp/recipe.yaml --resume")


def test_resume_begins_where_nothing_is_and_is_content_where_all_is_done(recipe):
    config, said = recipe(), []
    first = prune_checkpoint(config, resume=True)
    made = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    second = prune_checkpoint(config, resume=True, say=said.append)
    assert said == [f"{config.out} is complete; there is nothing to resume"]
    assert second.to_dict() == first.to_dict()
    assert made == {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    with pytest.raises(WandappError, match="exists already"):
        prune_checkpoint(recipe(sparsity="1:4"), resume=True)


def test_older_output_stays_until_a_resumed_run_replaces_it(recipe):
    prune_checkpoint(recipe(sparsity="1:4"))
    config = recipe(overwrite=True)
    with pytest.raises(Interrupted):
        prune_checkpoint(config, on_progress=stop_after(2))
    assert PruneConfig.from_yaml(Path(config.out) / "wandapp/recipe.yaml").sparsity == "1:4"
    prune_checkpoint(config, resume=True)
    assert PruneConfig.from_yaml(Path(config.out) / "wandapp/recipe.yaml").sparsity == "2:4"
    assert not list(Path(config.out).parent.glob(".*"))


def _other_weights(config: PruneConfig) -> PruneConfig:
    copy = Path(config.out).with_name("finetuned")
    shutil.copytree(config.model, copy)
    weights = load_file(copy / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    return config.model_copy(update={"model": str(copy)})


def _other_tokens(config: PruneConfig) -> PruneConfig:
    save_file({"tokens": torch.ones(4, 24, dtype=torch.int64)}, config.calibration)
    return config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda config: config.model_copy(update={"sparsity": "1:4"}), r"recipe\.sparsity was '2:4' and is now '1:4'"),
        (lambda config: config.model_copy(update={"method": "magnitude"}), r"recipe\.method was 'wanda'"),
        (lambda config: config.model_copy(update={"batch_size": 4}), r"batch_size was 2 and is now 4"),
        (_other_weights, r"source was \('model.safetensors'"),
        (_other_tokens, r"calibration_sha256 was "),
    ],
)
def test_another_run_is_not_continued_and_the_difference_is_named(change, field, recipe):
    config = recipe()
    interrupt(config, 1)
    with pytest.raises(WandappError, match=field + r".*delete that folder to start over"):
        prune_checkpoint(change(config), resume=True)
    assert len(list(partial_of(config.out).glob("model-*"))) == 1


def test_other_library_versions_are_named_and_a_moved_checkpoint_is_no_difference(recipe, monkeypatch):
    config = recipe()
    interrupt(config, 1)
    copy = Path(config.out).with_name("moved")
    shutil.copytree(config.model, copy)
    moved = config.model_copy(update={"model": str(copy)})
    with monkeypatch.context() as patch:
        patch.setattr("wandapp.manifest.importlib.metadata.version", lambda package: "0.0")
        with pytest.raises(WandappError, match=r"versions\.wandapp was .* is now '0\.0'"):
            prune_checkpoint(moved, resume=True)
    prune_checkpoint(moved, resume=True)


def test_an_option_that_is_new_and_not_given_is_no_difference(recipe):
    config = recipe()
    interrupt(config, 1)
    path = partial_of(config.out) / "wandapp" / "run.json"
    manifest = json.loads(path.read_text())
    del manifest["recipe"]["alpha_unit"], manifest["recipe"]["seq_len"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(WandappError, match=r"recipe\.alpha_unit was None and is now 'absolute'"):
        prune_checkpoint(config, resume=True)
    manifest["recipe"]["alpha_unit"] = "absolute"
    path.write_text(json.dumps(manifest))
    prune_checkpoint(config, resume=True)


def test_damaged_manifest_is_one_sentence(recipe):
    config = recipe()
    interrupt(config, 1)
    (partial_of(config.out) / "wandapp" / "run.json").write_text("{")
    with pytest.raises(WandappError, match=r"run\.json: cannot be read .*delete .*out\.partial to start over"):
        prune_checkpoint(config, resume=True)


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_full_disk_is_one_sentence_and_keeps_earlier_blocks(kept, stream, recipe, tmp_path, monkeypatch):
    config = recipe(stream=stream)
    write, written = shards._write, []

    def full(file, data):
        if file.name not in written:
            written.append(file.name)
        if len(written) > kept:
            raise OSError(28, "No space left on device")
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", full)
        with pytest.raises(WandappError, match=r"could not be written \(No space left on device\)") as caught:
            prune_checkpoint(config)
    assert (f"{kept} of 3 blocks are finished and kept" in str(caught.value)) == bool(kept)
    assert len(list(partial_of(config.out).glob("*"))) == (kept + 1 if kept else 0)
    prune_checkpoint(config, resume=True)
    assert_same(tensors(config.out), in_memory(config, tmp_path / "reference"))


def test_real_full_disk_is_one_sentence(recipe, tmp_path):
    """A file system of 128 KiB: room for one block, and for no hidden states of a longer run."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        config = recipe(out=str(small / "out"), stream=True)
        with pytest.raises(WandappError, match="No space left on device.* blocks are finished and kept"):
            prune_checkpoint(config)
        shutil.rmtree(small / "out.partial")
        save_file({"tokens": torch.ones(64, 64, dtype=torch.int64)}, config.calibration)
        with pytest.raises(WandappError, match="no room for the activations"):
            prune_checkpoint(config.model_copy(update={"activations": "disk"}))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_leftovers_of_another_command_are_no_run_to_resume(recipe):
    """Packing and saving leave files of the same names when they are killed."""
    partial = partial_of(recipe().out)
    (partial / "wandapp").mkdir(parents=True)
    (partial / "wandapp" / "lock").touch()
    (partial / "model-00001-of-00002.safetensors").touch()
    prune_checkpoint(recipe())
    assert not partial.exists()


def test_vanished_output_is_one_sentence(recipe):
    config = recipe(stream=True)
    with pytest.raises(
        WandappError, match=r"could not be written \(No such file or directory\); no block was finished"
    ):
        prune_checkpoint(config, on_progress=lambda _: shutil.rmtree(partial_of(config.out)))


def test_second_run_on_the_same_output_is_refused_until_the_first_is_gone(recipe, tmp_path):
    config = recipe()
    code = f"""
import sys
from pathlib import Path
from wandapp.output import locked
with locked(Path({str(partial_of(config.out))!r}), "out"):
    print("locked", flush=True)
    sys.stdin.read()
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(WandappError, match=rf"another run \(process {first.pid}\) is writing"):
        prune_checkpoint(config)
    first.kill()
    first.wait()
    prune_checkpoint(config)


def test_lock_is_of_the_folder_that_is_there_now(tmp_path):
    partial, out = tmp_path / "out.partial", tmp_path / "out"
    with locked(partial, out):
        partial.rename(tmp_path / "gone")
        with locked(partial, out):
            pass
