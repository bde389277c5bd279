"""Calibration: which tokens come out of which source, and one clear sentence for what cannot be used."""

import gzip
import json

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from wandapp import calibration
from wandapp.calibration import builtin_text, load_calibration, save_tokens
from wandapp.corpus import read_corpus
from wandapp.errors import WandappError


class NumberTokenizer:
    """The text "7 8 9" has the ids 7, 8, 9: every token of a text can be told from every other."""

    bos_token_id = None

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def numbers(first: int, count: int) -> str:
    return " ".join(str(number) for number in range(first, first + count))


def write_jsonl(path, documents, field="text"):
    path.write_text("".join(json.dumps({field: document, "url": "x"}) + "\n" for document in documents))
    return path


def is_run(row: torch.Tensor) -> bool:
    return bool((row.diff() == 1).all())


# Documents


def test_documents_give_one_crop_each(tmp_path):
    documents = [numbers(1000 * i, 30 + i) for i in range(10)]
    found = load_calibration(write_jsonl(tmp_path / "a.jsonl", documents), NumberTokenizer(), samples=10, seq_len=20)
    assert found.tokens.shape == (10, 20) and found.tokens.dtype == torch.int64
    assert all(is_run(row) for row in found.tokens)
    assert sorted((found.tokens[:, 0] // 1000).tolist()) == list(range(10))
    assert "each of 10 documents" in found.description and "seed 0" in found.description


def test_only_documents_longer_than_seq_len_are_drawn(tmp_path):
    documents = [numbers(0, 20), numbers(1000, 19), numbers(2000, 21), numbers(3000, 5), numbers(4000, 40)]
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    found = load_calibration(path, NumberTokenizer(), samples=2, seq_len=20)
    assert {int(row[0]) // 1000 for row in found.tokens} == {2, 4}


def test_a_crop_reaches_both_ends_of_its_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [numbers(0, 8)])
    crops = [load_calibration(path, NumberTokenizer(), samples=1, seq_len=6, seed=seed) for seed in range(40)]
    assert {int(crop.tokens[0, 0]) for crop in crops} == {0, 1, 2}


def test_too_few_long_documents_fall_back_to_windows_and_say_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [numbers(10 * i, 10) for i in range(10)])
    found = load_calibration(path, NumberTokenizer(), samples=4, seq_len=25)
    assert sorted(found.tokens.flatten().tolist()) == list(range(100))
    assert "only 0 of 10 have more than 25 tokens" in found.description


def test_same_seed_same_tokens_another_seed_others(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [numbers(1000 * i, 100) for i in range(50)])
    first, again, other = (
        load_calibration(path, NumberTokenizer(), samples=5, seq_len=20, seed=seed) for seed in (3, 3, 4)
    )
    assert first.tokens.equal(again.tokens) and first.sha256 == again.sha256
    assert not first.tokens.equal(other.tokens) and first.sha256 != other.sha256


def test_global_random_state_is_neither_used_nor_changed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [numbers(1000 * i, 100) for i in range(9)])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_calibration(path, NumberTokenizer(), samples=5, seq_len=20)
    assert torch.get_rng_state().equal(before)


def test_default_special_tokens_open_every_document(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["abcdefg"])
    found = load_calibration(path, tiny_tokenizer(add_bos=True), samples=1, seq_len=7, seed=0)
    plain = tiny_tokenizer()("abcdefg").input_ids
    assert found.tokens[0].tolist() in ([256, *plain[:6]], plain)
    with pytest.raises(WandappError, match="7 tokens available, 8 needed"):
        load_calibration(path, tiny_tokenizer(), samples=1, seq_len=8)


# One text


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 8), seq_len=st.integers(1, 9), spare=st.integers(0, 20), seed=st.integers(0, 99))
def test_windows_of_one_text_never_overlap(tmp_path_factory, samples, seq_len, spare, seed):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(numbers(0, samples * seq_len + spare))
    found = load_calibration(path, NumberTokenizer(), samples=samples, seq_len=seq_len, seed=seed)
    assert found.tokens.shape == (samples, seq_len)
    assert all(is_run(row) for row in found.tokens)
    assert len(found.tokens.unique()) == samples * seq_len


def test_every_placement_of_windows_occurs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 6))
    drawn = (load_calibration(path, NumberTokenizer(), samples=2, seq_len=2, seed=seed) for seed in range(200))
    placements = {tuple(found.tokens[:, 0].tolist()) for found in drawn}
    ordered = {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4)}
    assert placements == ordered | {(late, early) for early, late in ordered}


def test_a_very_long_text_is_read_in_part_and_says_so(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 1000)
    found = load_calibration(path, tiny_tokenizer(), samples=2, seq_len=4)
    assert found.tokens.shape == (2, 4) and "of characters" in found.description


def test_too_little_text_names_both_counts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 99))
    with pytest.raises(WandappError, match=r"99 tokens available, 100 needed \(10 samples x 10 tokens\)"):
        load_calibration(path, NumberTokenizer(), samples=10, seq_len=10)


def test_pydoc_parts_share_no_paragraph():
    parts = [{p.strip() for p in builtin_text(part).split("\n\n")} for part in ("calibration", "evaluation")]
    assert not parts[0] & parts[1]
    assert len(builtin_text("calibration")) > 200_000 and len(builtin_text("evaluation")) > 40_000
    assert builtin_text("evaluation") == builtin_text("evaluation")


def test_pydoc_calibrates(tiny_tokenizer):
    found = load_calibration("pydoc", tiny_tokenizer(), samples=4, seq_len=32)
    window = tiny_tokenizer().decode(found.tokens[2])
    assert window in builtin_text("calibration") and window not in builtin_text("evaluation")


# Files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet"])
def test_every_file_format_gives_the_same_tokens(tmp_path, name):
    documents = [numbers(1000 * i, 30) for i in range(5)] + [""]
    lines = "".join(json.dumps({"body": document}) + "\n\n" for document in documents)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"body": documents[:-1] + [None]}), tmp_path / name)
    else:
        (tmp_path / name).write_text(lines)
    found = load_calibration(tmp_path / name, NumberTokenizer(), samples=5, seq_len=20, text_field="body")
    assert sorted((found.tokens[:, 0] // 1000).tolist()) == list(range(5))
    expected = load_calibration(write_jsonl(tmp_path / "b.jsonl", documents), NumberTokenizer(), samples=5, seq_len=20)
    assert found.tokens.equal(expected.tokens)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_saved_tokens_come_back(tmp_path, name):
    tokens = torch.arange(12).view(3, 4)
    save_tokens(tokens, tmp_path / name)
    found = load_calibration(tmp_path / name, None)
    assert found.tokens.equal(tokens) and "all 3 samples of 4 given tokens" in found.description
    assert found.sha256 == load_calibration(tokens, None).sha256
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_given_ids_may_have_any_integer_type(tmp_path, dtype):
    save_file({"ids": torch.arange(12).view(3, 4).to(dtype)}, tmp_path / "a.safetensors")
    assert load_calibration(tmp_path / "a.safetensors", None).tokens.equal(torch.arange(12).view(3, 4))


def test_of_more_given_rows_the_first_are_used():
    found = load_calibration(torch.arange(12).view(3, 4), None, samples=2, seq_len=4)
    assert found.tokens.equal(torch.arange(8).view(2, 4)) and "the first 2 of 3" in found.description


@pytest.mark.parametrize("asked", [dict(samples=4), dict(seq_len=3), dict(seq_len=5), dict(samples=128, seq_len=2048)])
def test_given_ids_of_another_shape_are_refused(asked):
    with pytest.raises(
        WandappError, match=r"holds 3 samples x 4 tokens, got .*use --samples 3 \(or fewer\) --seq-len 4"
    ):
        load_calibration(torch.arange(12).view(3, 4), None, **asked)


def _text(content: str):
    return lambda path: path.write_text(content)


def _bytes(content: bytes):
    return lambda path: path.write_bytes(content)


def _array(array):
    return lambda path: np.save(path, array)


def _tensors(**tensors):
    return lambda path: save_file(tensors, path)


def _table(**columns):
    return lambda path: parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    "name, write, message",
    [
        (
            "field.jsonl",
            _text('{"body": "a", "url": "b"}'),
            "line 1: no field 'text', the fields are: body, url; choose",
        ),
        ("syntax.jsonl", _text('{"text": "a"}\n{"text": \n'), "line 2: not JSON"),
        ("list.jsonl", _text('{"text": "a"}\n\n[1]\n'), "line 3: each line must be one object, got list"),
        ("type.jsonl", _text('{"text": 7}\n'), "line 1: field 'text' must be text, got int"),
        ("latin1.jsonl", _bytes(b'{"text": "\xe9"}\n'), r"not UTF-8 \(byte 10\)"),
        ("latin1.txt", _bytes(b"ab\xe9 "), r"not UTF-8 \(byte 2\)"),
        ("empty.txt", _text(""), "holds no text"),
        ("empty.jsonl", _text("\n"), "holds no text"),
        ("blank.jsonl", _text('{"text": " "}\n'), "holds no text"),
        ("plain.json.gz", _text("{}"), "cannot be read"),
        ("cut.json.gz", _bytes(gzip.compress(b'{"text": "a"}')[:-9]), "cannot be read"),
        ("text.csv", _text("a"), r"ends in \.txt, .* got \.csv"),
        ("text.parquet", _text("PAR1"), r"not a readable \.parquet"),
        ("type.parquet", _table(text=[1], id=[2]), "field 'text' must be text, got int64"),
        ("field.parquet", _table(body=["a"], id=[2]), "no field 'text', the fields are: body, id"),
        ("corrupt.safetensors", _text("12345678"), r"not a readable \.safetensors"),
        ("corrupt.npy", _text("12345678"), r"not a readable \.npy"),
        ("object.npy", _array(np.array([{}], dtype=object)), r"not a readable \.npy"),
        ("float.npy", _array(np.zeros((2, 3), np.float32)), r"must be integers, got torch\.float32"),
        ("vector.npy", _array(np.zeros(3, np.int64)), r"matrix \[samples, seq_len\], got shape \[3\]"),
        (
            "negative.npy",
            _array(np.array([[1, 2], [3, -4]])),
            "id -4 at sample 1, position 1 is outside any vocabulary",
        ),
        ("bool.safetensors", _tensors(mask=torch.ones(2, 3) > 0), r"must be integers, got torch\.bool"),
        ("two.safetensors", _tensors(a=torch.ones(1, 1), b=torch.ones(1, 1)), "needs one tensor, or .* found: a, b"),
        ("missing.txt", lambda path: None, "no such file"),
        ("missing.npy", lambda path: None, "no such file"),
        ("folder", lambda path: path.mkdir(), "is a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_an_unusable_file_gets_one_sentence(tmp_path, tiny_tokenizer, name, write, message):
    write(tmp_path / name)
    with pytest.raises(WandappError, match=message) as raised:
        load_calibration(tmp_path / name, tiny_tokenizer())
    assert "\n" not in str(raised.value)


def test_save_tokens_refuses_other_suffixes_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(WandappError, match=r"saved as \.safetensors or \.npy, got \.pt"):
        save_tokens(torch.zeros(1, 1, dtype=torch.int64), tmp_path / "a.pt")
    for name in ("a.npy", "a.safetensors"):
        with pytest.raises(WandappError, match="cannot be written"):
            save_tokens(torch.zeros(1, 1, dtype=torch.int64), tmp_path / "no" / name)
        (tmp_path / name).mkdir()
        with pytest.raises(WandappError, match="cannot be written"):
            save_tokens(torch.zeros(1, 1, dtype=torch.int64), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.safetensors"]


def test_safetensors_file_names_its_tensor_tokens(tmp_path):
    save_tokens(torch.arange(6).view(2, 3), tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["tokens"].dtype == torch.int64


# Names and the hub


@pytest.fixture
def hub(monkeypatch):
    """The hub: `hub.rows` are the rows of every dataset, `hub.calls` what was asked for."""
    import datasets

    class Hub:
        rows = {"text": [numbers(1000 * i, 30) for i in range(5)] + [None]}
        calls = []

        def load_dataset(self, *names, **options):
            self.calls.append((*names, options))
            if isinstance(self.rows, Exception):
                raise self.rows
            return datasets.Dataset.from_dict(self.rows)

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def test_c4_is_the_first_training_shard(hub):
    found = load_calibration("c4", NumberTokenizer(), samples=5, seq_len=20)
    assert sorted((found.tokens[:, 0] // 1000).tolist()) == list(range(5))
    (name, options), file = hub.calls[0], "en/c4-train.00000-of-01024.json.gz"
    assert (name, options["data_files"], options["split"]) == ("allenai/c4", {"train": file}, "train")
    assert file in found.description


def test_wikitext2_is_one_text_from_the_training_split(hub):
    found = load_calibration("wikitext2", NumberTokenizer(), samples=3, seq_len=50)
    assert len(found.tokens.unique()) == 150
    assert hub.calls == [("Salesforce/wikitext", dict(split="train", name="wikitext-2-raw-v1"))]


@pytest.mark.parametrize("source, config", [("owner/name", None), ("owner/name:small", "small")])
def test_any_hub_dataset_by_name(hub, source, config):
    assert load_calibration(source, NumberTokenizer(), samples=2, seq_len=20).tokens.shape == (2, 20)
    assert hub.calls == [("owner/name", dict(split="train", name=config))]


def test_hub_dataset_needs_the_text_field(hub):
    hub.rows = {"body": ["a"], "id": [1]}
    with pytest.raises(WandappError, match="owner/name: no field 'text', the fields are: body, id"):
        load_calibration("owner/name", NumberTokenizer())
    with pytest.raises(WandappError, match="owner/name: field 'id' must be text, got int64"):
        load_calibration("owner/name", NumberTokenizer(), text_field="id")


def test_without_a_network_the_error_names_the_offline_sources(hub):
    hub.rows = ConnectionError("Couldn't reach the hub\nand more")
    with pytest.raises(WandappError, match=r"Couldn't reach the hub\); without a network use pydoc, a file .* self$"):
        load_calibration("c4", NumberTokenizer())


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(WandappError, match="'wikitxt2' is no source of text, did you mean 'wikitext2'"):
        load_calibration("wikitxt2", NumberTokenizer())


@pytest.mark.parametrize("count", [dict(samples=0), dict(seq_len=0), dict(samples=-1)])
def test_counts_below_one_are_refused(count):
    with pytest.raises(WandappError, match="must be at least 1"):
        load_calibration("pydoc", NumberTokenizer(), **count)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(WandappError, match="needs a tokenizer"):
        load_calibration("pydoc", None)


def test_raw_wikitext2_file_has_the_hubs_rows(tmp_path):
    (tmp_path / "raw").write_text(" \n = Title = \n \n One line . \u2028 still the same \n", encoding="utf-8")
    corpus = read_corpus(f"wikitext2:{tmp_path / 'raw'}", "calibration")
    assert corpus.documents == ["", " = Title = \n", "", " One line . \u2028 still the same \n"]


# The model


def test_an_id_outside_the_vocabulary_is_named(tiny_model):
    model, _ = tiny_model("llama")
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    tokens[1, 2] = 300
    with pytest.raises(
        WandappError, match="token id 300 at sample 1, position 2 is outside the model's vocabulary of 300"
    ):
        load_calibration(tokens, None, model=model)
    tokens[1, 2] = 299
    load_calibration(tokens, None, model=model)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_more_tokens_than_learned_positions_are_refused(tiny_model, tiny_tokenizer, family):
    model, _ = tiny_model(family)
    assert load_calibration("pydoc", tiny_tokenizer(), samples=1, seq_len=512, model=model).tokens.shape == (1, 512)
    with pytest.raises(WandappError, match="the model has 512 positions, got seq_len 513; use --seq-len 512"):
        load_calibration("pydoc", tiny_tokenizer(), samples=1, seq_len=513, model=model)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_computed_positions_may_go_past_the_native_length(tiny_model, tiny_tokenizer, family):
    model, _ = tiny_model(family)
    assert load_calibration("pydoc", tiny_tokenizer(), samples=1, seq_len=513, model=model).tokens.shape == (1, 513)


def test_own_text_follows_the_models_distribution(tiny_model, tiny_tokenizer, tiny_family):
    """With logits scaled up, sampling is greedy: every token is the argmax after the tokens before it, also where the
    attention's window slides."""
    model, config = tiny_model(tiny_family, final_logit_softcapping=None)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 1e4)  # untied from the embedding
    found = load_calibration("self", tiny_tokenizer(), samples=2, seq_len=28, model=model)
    assert (found.tokens[:, 0] == 256).all()
    with torch.no_grad():
        expected = model(found.tokens).logits[:, :-1].argmax(-1)
    assert found.tokens[:, 1:].equal(expected)
    assert found.description.startswith(
        "self: 2 samples of 28 tokens sampled from the model at temperature 1, BOS first;"
    )


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_own_text_draws_tokens_as_often_as_the_model_says(tiny_model, tiny_tokenizer, temperature):
    model, _ = tiny_model("llama")
    model.lm_head.weight.data *= 3  # some tokens are frequent, most are rare
    options = dict(samples=8192, seq_len=2, temperature=temperature, model=model)
    second = load_calibration("self", tiny_tokenizer(), **options).tokens[:, 1]
    with torch.no_grad():
        probability = model(torch.tensor([[256]])).logits[0, 0].double().div(temperature).softmax(-1)
    expected, found = 8192 * probability, second.bincount(minlength=len(probability))
    assert 0.02 < probability.max() < 0.5 and probability.min() < 1e-3
    assert ((found - expected).abs() <= 5 * expected.sqrt() + 5).all()


def test_own_text_is_seeded_batched_and_runs_past_eos(tiny_model, tiny_tokenizer):
    model, _ = tiny_model("llama")
    model.generation_config.top_k = 1  # a checkpoint's decoding advice does not count
    progress = []
    model.lm_head.weight.data[257] *= 4  # EOS is frequent
    options = dict(samples=260, seq_len=20, model=model)
    first = load_calibration(
        "self", tiny_tokenizer(), seed=5, on_progress=lambda done, total: progress.append((done, total)), **options
    )
    assert first.tokens.shape == (260, 20) and progress == [(256, 260), (260, 260)]
    assert (first.tokens[:, :-1] == 257).any()
    assert len(first.tokens.unique(dim=0)) == 260
    assert first.tokens.equal(load_calibration("self", tiny_tokenizer(), seed=5, **options).tokens)
    assert not first.tokens.equal(load_calibration("self", tiny_tokenizer(), seed=6, **options).tokens)


def test_long_samples_of_own_text_hold_several_texts(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(calibration, "OWN_TEXT_LEN", 8)
    monkeypatch.setattr(calibration, "OWN_TEXT_BATCH", 64)
    model, progress = tiny_model("llama")[0], []
    found = load_calibration(
        "self", tiny_tokenizer(), samples=40, seq_len=19, model=model, on_progress=lambda *done: progress.append(done)
    )
    assert found.tokens.shape == (40, 19)  # of three texts of 7
    assert [i for i in range(19) if (found.tokens[:, i] == 256).all()] == [0, 7, 14]
    assert progress == [(21, 40), (40, 40)] and "begun anew every 7 tokens" in found.description


def test_own_text_without_bos_starts_anywhere(tiny_model):
    model, _ = tiny_model("llama", bos_token_id=None)
    found = load_calibration("self", None, samples=8, seq_len=3, model=model)
    assert len(found.tokens[:, 0].unique()) > 4 and "a random token first" in found.description


def test_own_text_needs_a_working_model(tiny_model):
    with pytest.raises(WandappError, match="'self' needs the model"):
        load_calibration("self", None)
    model, _ = tiny_model("llama")
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(WandappError, match="cannot write calibration text: its output is NaN or Inf"):
        load_calibration("self", None, samples=1, seq_len=4, model=model)


def test_training_flags_survive_own_text(tiny_model):
    model, _ = tiny_model("gpt2")
    model.transformer.h[1].train()
    flags = {name: module.training for name, module in model.named_modules()}
    load_calibration("self", None, samples=1, seq_len=4, model=model)
    assert flags == {name: module.training for name, module in model.named_modules()}
