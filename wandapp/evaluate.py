"""Perplexity, with every circumstance it depends on.

The text is tokenised once with the tokenizer's defaults and cut into windows of seq_len that do not overlap (tail
dropped); every token of a window but the first is predicted from those before it; perplexity = exp(mean loss).
Figures compare only where split, seq_len, windows and text hash agree: all of them are in the result.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wandapp.blocks import forward_errors
from wandapp.calibration import (
    DEFAULT_SEQ_LEN,
    check_ids,
    check_seq_len,
    encode,
    ids_sha256,
    inference,
    is_token_file,
    read_tokens,
    require_positive,
    vocabulary_size,
)
from wandapp.corpus import read_corpus
from wandapp.errors import WandappError
from wandapp.skipping import skipping_zeros

_LOSS_TOKENS = 256  # tokens whose logits are widened to fp32 at a time: 154 MB for a vocabulary of 150,000
_LOGITS_BYTES = 2**31  # of one batch, on a GPU


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it was measured on."""

    perplexity: float
    mean_nll: float
    tokens: int  # predicted: windows x (seq_len - 1)
    windows: int
    seq_len: int
    text: str
    split: str
    text_sha256: str  # of the text in UTF-8, or of given ids as little-endian int64
    tokens_sha256: str  # of the ids that were used: what the tokenizer made of the text
    tokenizer: str
    dtype: str
    seconds: float

    def to_dict(self) -> dict:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Windows:
    ids: Tensor  # [windows, seq_len] int64
    text: str
    split: str
    sha256: str


def perplexity(
    model: nn.Module,
    tokenizer: Any | None,
    *,
    text: str | Path = "wikitext2",
    seq_len: int | None = None,
    windows: int | None = None,
    batch_size: int | None = None,
    text_field: str = "text",
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of `model` on `text`, measured on the device and in the dtype that the model has.

    On a CPU in fp32, products with the zeros of a pruned model are left out, which moves the figure by rounding only.

    text         a source of text (`read_corpus`, its evaluation part; documents are joined by a blank line, c4's by a
                 space) or a .safetensors or .npy file of token ids [windows, seq_len], used as they are
    seq_len      None: 2048, or the width of given ids. Given ids of another width: error
    windows      use the first so many; None: all. Fewer than that in the text: error
    batch_size   windows per forward; None: 1 on a CPU, on a GPU as many as keep one batch of logits below 2 GiB
    text_field   the field that holds the text in .jsonl, .parquet and hub datasets
    on_progress  called with (windows done, windows) after every batch
    raises       WandappError on unusable text, and where a window's loss is not finite
    """
    started = time.perf_counter()
    require_positive(seq_len=seq_len, windows=windows, batch_size=batch_size)
    source = _given_windows(text, seq_len) if is_token_file(text) else _cut(text, tokenizer, seq_len, text_field)
    total, width = source.ids.shape
    if (windows or total) > total or width < 2:
        raise WandappError(
            f"{source.text}: {total} windows of {width} tokens available, {windows or total} of at least 2 needed; "
            "lower --windows or --seq-len, or choose a longer text"
        )
    ids = source.ids[:windows]
    check_seq_len(model, width)
    check_ids(ids, model)
    nll = _negative_log_likelihood(model, ids, batch_size or _auto_batch_size(model, width), on_progress)
    predicted = len(ids) * (width - 1)
    return PerplexityResult(
        perplexity=math.exp(nll / predicted),
        mean_nll=nll / predicted,
        tokens=predicted,
        windows=len(ids),
        seq_len=width,
        text=source.text,
        split=source.split,
        text_sha256=source.sha256,
        tokens_sha256=ids_sha256(ids),
        tokenizer="none" if tokenizer is None else tokenizer.name_or_path or type(tokenizer).__name__,
        dtype=str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - started,
    )


def _cut(source: str | Path, tokenizer: Any | None, seq_len: int | None, text_field: str) -> _Windows:
    """All windows of the text."""
    corpus = read_corpus(source, "evaluation", text_field)
    seq_len, text = seq_len or DEFAULT_SEQ_LEN, corpus.text
    ids = torch.tensor(encode(tokenizer, [text])[0])
    count = len(ids) // seq_len
    if not count:
        raise WandappError(
            f"{corpus.name}: {len(ids)} tokens available, {seq_len} needed for one window; lower --seq-len or choose a "
            "longer text"
        )
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return _Windows(ids[: count * seq_len].view(count, seq_len), corpus.name, corpus.split, sha256)


def _given_windows(path: str | Path, seq_len: int | None) -> _Windows:
    ids = read_tokens(path)
    if seq_len not in (None, ids.shape[1]):
        raise WandappError(f"{path} holds windows of {ids.shape[1]} tokens, got --seq-len {seq_len}; make them agree")
    return _Windows(ids, str(path), "", ids_sha256(ids))


def _negative_log_likelihood(
    model: nn.Module, ids: Tensor, batch_size: int, on_progress: Callable[[int, int], None] | None
) -> float:
    """Sum over all windows and all their tokens but the first: losses in fp32, their sum in fp64."""
    device = model.get_input_embeddings().weight.device
    total, done = 0.0, 0
    with inference(model), skipping_zeros(model.parameters()):
        for batch in ids.split(batch_size):
            batch = batch.to(device)
            with forward_errors(model):
                logits = model(batch, use_cache=False).logits
            losses = _window_losses(logits, batch)
            if not losses.isfinite().all():
                bad = done + int(losses.isfinite().logical_not().nonzero()[0])
                raise WandappError(
                    f"window {bad}: the loss is NaN or Inf; check the checkpoint's weights and use a wider --dtype"
                )
            total += losses.sum().item()
            done += len(batch)
            if on_progress:
                on_progress(done, len(ids))
    return total


def _window_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[windows] fp64: each window's summed loss. Slices of tokens, so that no fp32 copy of all logits is made."""
    losses = torch.zeros(len(ids), dtype=torch.float64, device=logits.device)
    for start in range(0, ids.shape[1] - 1, _LOSS_TOKENS):
        targets = ids[:, start + 1 : start + 1 + _LOSS_TOKENS].to(logits.device)  # [windows, slice]
        scores = logits[:, start : start + targets.shape[1]].flatten(0, 1).float()  # [windows x slice, vocabulary]
        losses += F.cross_entropy(scores, targets.flatten(), reduction="none").view_as(targets).double().sum(1)
    return losses


def _auto_batch_size(model: nn.Module, seq_len: int) -> int:
    weight = model.get_input_embeddings().weight
    if weight.device.type == "cpu":
        return 1
    return max(1, _LOGITS_BYTES // (seq_len * vocabulary_size(model) * weight.element_size()))
