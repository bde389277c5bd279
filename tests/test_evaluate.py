"""Perplexity against numbers worked out by hand and against a loop over the definition."""

import hashlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp import corpus
from wandapp.calibration import builtin_text, save_tokens
from wandapp.errors import WandappError
from wandapp.evaluate import perplexity


class Bigram(torch.nn.Module):
    """Predicts the next token from the last one alone: P[last, next]."""

    config = SimpleNamespace(get_text_config=SimpleNamespace)

    def __init__(self, probability):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.as_tensor(probability).log())

    def get_input_embeddings(self):
        return self.table

    def forward(self, ids, use_cache):
        return SimpleNamespace(logits=self.table(ids))


def tokens_file(path, rows):
    save_tokens(torch.tensor(rows), path)
    return path


def test_hand_computed_bigram_model(tmp_path):
    model = Bigram([[0.5, 0.5], [0.25, 0.75]])
    path = tokens_file(tmp_path / "a.npy", [[0, 1, 1], [1, 0, 0]])
    result = perplexity(model, None, text=path)
    # Window 0 -> 1 -> 1 has 1/2 * 3/4, window 1 -> 0 -> 0 has 1/4 * 1/2: the fourth root of 1 / (3/8 * 1/8)
    assert result.perplexity == pytest.approx((64 / 3) ** 0.25, rel=1e-6)
    assert result.mean_nll == pytest.approx(math.log(64 / 3) / 4, rel=1e-6)
    assert (result.tokens, result.windows, result.seq_len) == (4, 2, 3)


@settings(max_examples=20, deadline=None)
@given(vocabulary=st.integers(1, 40), windows=st.integers(1, 5), seq_len=st.integers(2, 600), batch=st.integers(1, 6))
def test_uniform_model_has_the_vocabulary_as_perplexity(tmp_path_factory, vocabulary, windows, seq_len, batch):
    ids = torch.randint(vocabulary, (windows, seq_len), generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("ids") / "a.npy"
    save_tokens(ids, path)
    result = perplexity(Bigram(torch.ones(vocabulary, vocabulary)), None, text=path, batch_size=batch)
    assert result.perplexity == pytest.approx(vocabulary, rel=1e-5)
    assert result.tokens == windows * (seq_len - 1)


def test_real_model_agrees_with_a_loop_in_double(tiny_model, tiny_tokenizer, tmp_path):
    model, _ = tiny_model("llama")
    text = builtin_text("evaluation")[:1650]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    ids = torch.tensor(tiny_tokenizer()(text).input_ids)
    nll = []
    for start in range(0, len(ids) - 299, 300):
        window = ids[start : start + 300]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        nll += [float(logits[t].logsumexp(0) - logits[t, window[t + 1]]) for t in range(299)]
    for batch_size in (None, 1, 2, 3, 8):
        result = perplexity(model, tiny_tokenizer(), text=tmp_path / "a.txt", seq_len=300, batch_size=batch_size)
        assert result.mean_nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)  # fp32 logits
        assert result.perplexity == math.exp(result.mean_nll)
        assert (result.windows, result.tokens) == (5, 5 * 299)  # 150 tokens of tail are dropped


def test_windows_takes_the_first(tiny_model, tiny_tokenizer, tmp_path):
    model, _ = tiny_model("llama")
    ids = torch.tensor(tiny_tokenizer()(builtin_text("evaluation")[:200]).input_ids[:160]).view(5, 32)
    save_tokens(ids, tmp_path / "five.npy")
    save_tokens(ids[:2], tmp_path / "two.npy")
    first = perplexity(model, None, text=tmp_path / "five.npy", windows=2)
    assert first.mean_nll == perplexity(model, None, text=tmp_path / "two.npy").mean_nll
    with pytest.raises(WandappError, match="5 windows of 32 tokens available, 6 of at least 2 needed"):
        perplexity(model, None, text=tmp_path / "five.npy", windows=6)


def test_result_states_every_circumstance(tiny_model, tiny_tokenizer, tmp_path):
    model, _ = tiny_model("llama")
    progress = []
    result = perplexity(
        model.to(torch.bfloat16),
        tiny_tokenizer(),
        text="pydoc",
        seq_len=16,
        windows=5,
        batch_size=2,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    found = json.loads(json.dumps(result.to_dict()))
    assert found["text_sha256"] == hashlib.sha256(builtin_text("evaluation").encode()).hexdigest()
    expected = dict(split="evaluation", seq_len=16, windows=5, tokens=75, dtype="bfloat16", tokenizer="tiny-byte-level")
    assert expected.items() <= found.items()
    assert "pydoc" in found["text"] and found["seconds"] > 0
    assert progress == [(2, 5), (4, 5), (5, 5)]


def test_dropout_is_off_while_measuring(tiny_model, tiny_tokenizer):
    model, _ = tiny_model("gpt2")
    quiet, _ = tiny_model("gpt2")
    noisy = model.train()
    options = dict(text="pydoc", seq_len=64, windows=2)
    assert (
        perplexity(noisy, tiny_tokenizer(), **options).mean_nll
        == perplexity(quiet, tiny_tokenizer(), **options).mean_nll
    )
    assert noisy.training and noisy.transformer.drop.training


def test_short_text_names_both_counts(tiny_model, tiny_tokenizer, tmp_path):
    model, _ = tiny_model("llama")
    (tmp_path / "a.txt").write_text("0123456789")
    with pytest.raises(WandappError, match="10 tokens available, 11 needed for one window"):
        perplexity(model, tiny_tokenizer(), text=tmp_path / "a.txt", seq_len=11)
    with pytest.raises(WandappError, match="10 tokens available, 2048 needed"):
        perplexity(model, tiny_tokenizer(), text=tmp_path / "a.txt")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_first_window_with_a_nan_loss_is_named(tmp_path, batch_size):
    probability = torch.full((3, 3), 1 / 3)
    probability[2] = float("nan")
    path = tokens_file(tmp_path / "a.npy", [[0, 1, 0], [0, 0, 2], [1, 0, 0], [0, 2, 1], [2, 2, 2]])
    with pytest.raises(WandappError, match="window 3: the loss is NaN or Inf"):
        perplexity(Bigram(probability), None, text=path, batch_size=batch_size)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(windows=0), "windows must be at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(seq_len=4), "holds windows of 3 tokens, got --seq-len 4"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    path = tokens_file(tmp_path / "a.npy", [[0, 1, 1]])
    with pytest.raises(WandappError, match=message):
        perplexity(Bigram(torch.ones(2, 2)), None, text=path, **options)


def test_ids_outside_the_vocabulary_and_one_token_windows_are_refused(tmp_path):
    with pytest.raises(WandappError, match="token id 2 at sample 0, position 1"):
        perplexity(Bigram(torch.ones(2, 2)), None, text=tokens_file(tmp_path / "a.npy", [[0, 2]]))
    with pytest.raises(WandappError, match="windows of 1 tokens available, 1 of at least 2 needed"):
        perplexity(Bigram(torch.ones(2, 2)), None, text=tokens_file(tmp_path / "b.npy", [[0]]))


def test_self_is_no_evaluation_text():
    with pytest.raises(WandappError, match="'self' is no source of text"):
        perplexity(Bigram(torch.ones(2, 2)), None, text="self")


def test_more_tokens_than_learned_positions_are_refused(tiny_model, tiny_tokenizer):
    model, _ = tiny_model("gpt2")
    with pytest.raises(WandappError, match="the model has 512 positions, got seq_len 600"):
        perplexity(model, tiny_tokenizer(), text="pydoc", seq_len=600)


# What the text is

RAW = " \n = Title = \n \n A line of text . \n"
ROWS = ["", " = Title = \n", "", " A line of text . \n"]
STANDARD = "\n\n = Title = \n\n\n\n\n A line of text . \n"


@pytest.fixture
def measured(tmp_path, tiny_tokenizer):
    """measured(source) -> (the sha256 of the text that was measured, the result)."""

    def measure(source):
        result = perplexity(Bigram(torch.ones(258, 258)), tiny_tokenizer(), text=source, seq_len=4, windows=1)
        return result.text_sha256, result

    return measure


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_text_file_is_measured_whole(tmp_path, measured):
    (tmp_path / "a.txt").write_text(RAW)
    assert measured(tmp_path / "a.txt")[0] == sha256(RAW)


def test_raw_wikitext2_file_gives_the_standard_text(tmp_path, measured, monkeypatch):
    (tmp_path / "a.txt").write_text(RAW)
    assert measured(f"wikitext2:{tmp_path / 'a.txt'}")[0] == sha256(STANDARD)
    monkeypatch.setattr(corpus, "_WIKITEXT2_TEST_SHA256", sha256(RAW))
    digest, result = measured(tmp_path / "a.txt")
    assert digest == sha256(STANDARD) and "wikitext2 (rows of" in result.text


def test_documents_are_joined_by_a_blank_line(tmp_path, measured):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert measured(tmp_path / "a.jsonl")[0] == sha256("one\n\ntwo")


def test_hub_texts(measured, monkeypatch):
    import datasets

    asked = []

    def load_dataset(dataset, **options):
        asked.append((dataset, options))
        rows = ROWS if dataset == "Salesforce/wikitext" else [f"document {i}" for i in range(1200)]
        return datasets.Dataset.from_dict({"text": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    digest, result = measured("wikitext2")
    assert digest == sha256(STANDARD) and result.split == "test"
    digest, result = measured("c4")
    assert digest == sha256(" ".join(f"document {i}" for i in range(1100))) and result.split == "validation"
    assert asked[1][1]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
