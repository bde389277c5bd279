"""Calibration tokens [samples, seq_len]: drawn from documents, cut from a text, given as ids, or written by the model.

Text is tokenised with the tokenizer's defaults, special tokens included, as the Wanda authors do: a Llama tokenizer
opens every document with its BOS token, a GPT-2 tokenizer adds nothing. Nothing is ever padded.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wandapp.blocks import position_table
from wandapp.corpus import Corpus, builtin_text, existing_file, first_line, read_corpus
from wandapp.errors import WandappError, shorten
from wandapp.memory import kept_pages
from wandapp.tokenizer import tokenizer_errors

__all__ = ["Calibration", "builtin_text", "load_calibration", "save_tokens"]

DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 128, 2048  # arXiv:2306.11695
TOKEN_SUFFIXES = (".safetensors", ".npy")
_ID_DTYPES = {*(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)}
# What numpy raises at a damaged header, which it reads as Python text.
_NPY_ERRORS = (
    ValueError,
    TypeError,
    EOFError,
    OSError,
    ArithmeticError,
    SyntaxError,
    RecursionError,
    MemoryError,
    TokenError,
)
_DOCUMENTS_PER_CALL = 64
# Characters read per token wanted when one text is cut into windows: far above any tokenizer's 3 to 5, yet a bound on
# the tokenizer's memory (about 100 bytes per token) when the text has gigabytes.
_CHARACTERS_PER_TOKEN = 64
# Tokens of one text that the model writes; longer samples hold several. Short ones start afresh more often and read less of
# the KV cache, which the batch bounds: 256 x 128 tokens x 0.5 MB = 16 GB for a 7B model
OWN_TEXT_LEN, OWN_TEXT_BATCH = 128, 256


class Calibration(NamedTuple):
    """Tokens [samples, seq_len] int64, a sentence that says how they were taken, and the sha256 of the ids."""

    tokens: Tensor
    description: str
    sha256: str

    def followed_by(self, other: "Calibration") -> "Calibration":
        """The samples of both, one after the other."""
        tokens = torch.cat([self.tokens, other.tokens])
        return Calibration(tokens, f"{self.description}; and {other.description}", ids_sha256(tokens))


def load_calibration(
    source: str | Path | Tensor,
    tokenizer: Any | None,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    text_field: str = "text",
    model: nn.Module | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Tokens [samples, seq_len] from `source`, described and hashed; the same seed gives the same tokens.

    source       a source of text (`read_corpus`) | "self": the model writes it | a tensor of ids [samples, seq_len] |
                 a .safetensors or .npy file of such ids
    tokenizer    may be None where no text is read
    samples      None: 128, or every row of given ids. Of more given rows the first `samples` are used; fewer: error
    seq_len      None: 2048, or the width of given ids. Given ids of another width: error
    temperature  at which the model writes: its logits are divided by it
    text_field   the field that holds the text in .jsonl, .parquet and hub datasets
    model        needed by "self"; otherwise ids and seq_len are checked against what it can take
    on_progress  called with (samples written, samples) while the model writes
    raises       WandappError on anything unusable, with the way out

    Documents: draw one at random, keep it if it has more than seq_len tokens, take a random crop of seq_len.
    Differs from the Wanda authors' code: drawn without replacement, and a crop may end at the document's last token.
    Too few long documents, or a source that is one text: random windows of the whole text (documents joined by a blank
    line) that do not overlap. The description says which it was.
    """
    require_positive(samples=samples, seq_len=seq_len)
    if isinstance(source, Tensor) or is_token_file(source):
        tokens, description = _given_tokens(source, samples, seq_len)
        check_seq_len(model, tokens.shape[1])
    else:
        samples, seq_len = samples or DEFAULT_SAMPLES, seq_len or DEFAULT_SEQ_LEN
        check_seq_len(model, seq_len)
        generator = torch.Generator().manual_seed(seed)
        if source == "self":
            tokens, description = _own_text(model, tokenizer, samples, seq_len, generator, temperature, on_progress)
        else:
            corpus = read_corpus(source, "calibration", text_field)
            tokens, description = _draw(corpus, tokenizer, samples, seq_len, generator)
        description += f"; seed {seed}"
    check_ids(tokens, model)
    return Calibration(tokens, description, ids_sha256(tokens))


def kept_calibration(path: Path) -> Calibration:
    """What `save_tokens` wrote with its origin, as it was before."""
    tokens = read_tokens(path)
    return Calibration(tokens, _origin(path), ids_sha256(tokens))


def save_tokens(tokens: Tensor, path: str | Path, origin: str | None = None) -> None:
    """Write token ids to a .safetensors (as `tokens`) or .npy file: whole, or not at all.

    origin   how they were drawn; a .safetensors keeps it, and a run that reads the file repeats it
    """
    path = Path(path)
    if not is_token_file(path):
        suffix = path.suffix or "no suffix"
        raise WandappError(f"{path}: token ids are saved as {' or '.join(TOKEN_SUFFIXES)}, got {suffix}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    tokens = tokens.detach().to("cpu", torch.int64).contiguous()
    try:
        if path.suffix == ".npy":
            with open(partial, "wb") as file:
                np.save(file, tokens.numpy())
        else:
            save_file({"tokens": tokens}, partial, metadata={"origin": origin} if origin else None)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise WandappError(f"{path}: cannot be written ({first_line(error)}); choose another place") from error


# Taking samples from text


def _draw(corpus: Corpus, tokenizer: Any, samples: int, seq_len: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """Crops of distinct documents where enough of them are long, else windows of the whole text."""
    source = ", ".join(filter(None, [corpus.name, corpus.split]))
    reason = ""
    if not corpus.is_continuous:
        crops = _crops(corpus.documents, tokenizer, samples, seq_len, generator)
        if len(crops) == samples:
            return torch.tensor(crops), f"{source}: a random crop of {seq_len} tokens of each of {samples} documents"
        reason = (
            f", its documents joined by blank lines because only {len(crops)} of {len(corpus.documents)} have more "
            f"than {seq_len} tokens"
        )
    tokens, text = _windows(corpus, tokenizer, samples, seq_len, generator)
    return tokens, f"{source}: {samples} random windows of {seq_len} tokens, without overlap, of {text}{reason}"


def _crops(
    documents: Sequence[str | None], tokenizer: Any, samples: int, seq_len: int, generator: torch.Generator
) -> list[list[int]]:
    """Up to `samples` random crops, each of another document with more than seq_len tokens."""
    crops = []
    order = torch.randperm(len(documents), generator=generator).tolist()
    for start in range(0, len(order), _DOCUMENTS_PER_CALL):
        drawn = [documents[i] or "" for i in order[start : start + _DOCUMENTS_PER_CALL]]
        # A token covers a byte or more: short documents need no tokenizer. Half, to leave room for normalisers.
        for ids in encode(tokenizer, [document for document in drawn if len(document.encode()) >= seq_len // 2]):
            if len(ids) > seq_len:
                first = int(torch.randint(len(ids) - seq_len + 1, (), generator=generator))
                crops.append(ids[first : first + seq_len])
            if len(crops) == samples:
                return crops
    return crops


def _windows(
    corpus: Corpus, tokenizer: Any, samples: int, seq_len: int, generator: torch.Generator
) -> tuple[Tensor, str]:
    """Windows that do not overlap, every placement equally likely, in random order; and what they were cut from."""
    text, what = corpus.text, "the text"
    longest = samples * seq_len * _CHARACTERS_PER_TOKEN
    if len(text) > longest:
        first = int(torch.randint(len(text) - longest + 1, (), generator=generator))
        text, what = text[first : first + longest], f"characters {first} to {first + longest} of the text"
    ids = torch.tensor(encode(tokenizer, [text])[0])
    spare = len(ids) - samples * seq_len
    if spare < 0:
        raise WandappError(
            f"{corpus.name}: {len(ids)} tokens available, {samples * seq_len} needed ({samples} samples x {seq_len} "
            "tokens); lower --samples or --seq-len, or choose a longer text"
        )
    # A row of spare + samples places: `samples` of them hold a window, each of the others one token left out.
    places = torch.randperm(spare + samples, generator=generator)[:samples]
    windows_before = places.argsort().argsort()
    starts = places + windows_before * (seq_len - 1)
    return ids[starts[:, None] + torch.arange(seq_len)], what


def encode(tokenizer: Any | None, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's default special tokens."""
    if tokenizer is None:
        raise WandappError("text needs a tokenizer, got none; pass one, or give token ids [samples, seq_len]")
    if not texts:
        return []
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    with tokenizer_errors(f"{name}: the tokenizer cannot read this text"):
        return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]


# Text written by the model


def _own_text(
    model: nn.Module | None,
    tokenizer: Any | None,
    samples: int,
    seq_len: int,
    generator: torch.Generator,
    temperature: float,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, str]:
    """Texts that start with BOS, or a random token where there is none, and run past any EOS.

    A sample longer than OWN_TEXT_LEN holds several, one after the other.
    """
    if model is None:
        raise WandappError("calibration 'self' needs the model, got none; pass it, or choose another source")
    bos = (model.config.get_text_config() if tokenizer is None else tokenizer).bos_token_id
    pieces = math.ceil(seq_len / OWN_TEXT_LEN)
    count, length = samples * pieces, math.ceil(seq_len / pieces)
    start = torch.randint(vocabulary_size(model), (count, 1), generator=generator)
    if bos is not None:
        check_ids(torch.tensor([[bos]]), model)
        start.fill_(bos)
    texts = []
    for batch in start.split(OWN_TEXT_BATCH):
        texts.append(_continue(model, batch, length, generator, temperature))
        if on_progress:
            on_progress(sum(map(len, texts)) // pieces, samples)
    first = "a random token" if bos is None else "BOS"
    how = f"self: {samples} samples of {seq_len} tokens sampled from the model at temperature {temperature:g}, {first} first"
    if pieces > 1:
        how += f", begun anew every {length} tokens"
    return torch.cat(texts).view(samples, -1)[:, :seq_len].contiguous(), how


def _continue(model: nn.Module, tokens: Tensor, seq_len: int, generator: torch.Generator, temperature: float) -> Tensor:
    """`tokens` [batch, 1] sampled on to seq_len. model.generate would obey the checkpoint's top-k and penalties."""
    device, cache = model.get_input_embeddings().weight.device, None
    with inference(model):
        while tokens.shape[1] < seq_len:
            output = model(tokens[:, -1:].to(device), past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise WandappError(
                    f"the model cannot write calibration text: {type(model).__name__} remembers no past_key_values; use another "
                    "--calibration, and --self-samples 0"
                )
            # Inverse of the distribution function at a uniform number: a sixth of torch.multinomial's time on a CPU.
            below = (output.logits[:, -1].float() / temperature).softmax(-1).cumsum(-1)
            if not below[:, -1].isfinite().all():
                raise WandappError(
                    "the model cannot write calibration text: its output is NaN or Inf; use a wider --dtype"
                )
            drawn = torch.rand(len(tokens), 1, generator=generator).to(device) * below[:, -1:]
            following = torch.searchsorted(below, drawn, right=True).clamp_(max=below.shape[1] - 1)
            tokens = torch.cat([tokens, following.cpu()], dim=1)
    return tokens


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The model without dropout and gradients, freed activations kept; its training flags come back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), kept_pages():
            yield
    finally:
        for module in training:
            module.training = True


# Token ids


def as_ids(given: Any) -> Tensor:
    """Token ids [samples, seq_len] from a tensor, an array or lists of integers."""
    if isinstance(given, Tensor):
        return given
    try:
        return torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError):
        raise WandappError(
            f"calibration must be a name, a path or token ids [samples, seq_len], got {type(given).__name__}"
        ) from None


def is_token_file(source: str | Path) -> bool:
    """Whether the name says that the file holds token ids."""
    return str(source).endswith(TOKEN_SUFFIXES)


def read_tokens(path: str | Path) -> Tensor:
    """Token ids [samples, seq_len] int64 from a .npy, or a .safetensors that holds one tensor or one named `tokens`."""
    path = existing_file(path)
    try:
        if path.suffix == ".npy":  # mapped: the header may claim more than there is
            with np.errstate(over="ignore"):
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("an archive of several arrays")
            tensors = {"tokens": torch.from_numpy(array.copy())}
        else:
            tensors = load_file(path)
    except (SafetensorError, *_NPY_ERRORS) as error:
        raise WandappError(
            f"{path} is not a readable {path.suffix} of token ids ({first_line(error)}); save them again as int64"
        ) from error
    if len(tensors) != 1 and "tokens" not in tensors:
        found = ", ".join(sorted(tensors)) or "none"
        raise WandappError(f"{path}: needs one tensor, or one named 'tokens', found: {found}")
    return _as_ids(tensors.get("tokens", next(iter(tensors.values()))), str(path))


def _given_tokens(source: Tensor | str | Path, samples: int | None, seq_len: int | None) -> tuple[Tensor, str]:
    """The first `samples` rows of ids that are used as they are."""
    is_tensor = isinstance(source, Tensor)
    name = "the token tensor" if is_tensor else str(source)
    tokens = _as_ids(source, name) if is_tensor else read_tokens(source)
    rows, width = tokens.shape
    samples, seq_len = samples or rows, seq_len or width
    if seq_len != width or samples > rows:
        raise WandappError(
            f"{name} holds {rows} samples x {width} tokens, got --samples {samples} --seq-len {seq_len}; "
            f"use --samples {rows} (or fewer) --seq-len {width}"
        )
    which = f"all {rows}" if samples == rows else f"the first {samples} of {rows}"
    origin = "" if is_tensor else _origin(source)
    return tokens[:samples], f"{name}: {which} samples of {width} given tokens" + (origin and f", drawn from {origin}")


def _origin(path: str | Path) -> str:
    """How the tokens in a file were drawn, where `save_tokens` was told."""
    if Path(path).suffix != ".safetensors":
        return ""
    with safe_open(path, framework="pt") as file:  # read before, so it is one
        return shorten((file.metadata() or {}).get("origin", ""), 500)


def _as_ids(tokens: Tensor, name: str) -> Tensor:
    """`tokens` as int64 on the CPU, after checking that they are a matrix of integers."""
    if tokens.dtype not in _ID_DTYPES:
        raise WandappError(f"{name}: token ids must be integers, got {tokens.dtype}; save them as int64")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise WandappError(f"{name}: token ids must be a matrix [samples, seq_len], got shape {list(tokens.shape)}")
    return tokens.detach().to("cpu", torch.int64)


def check_ids(tokens: Tensor, model: nn.Module | None) -> None:
    """Raise where an id is negative or has no row in the model's embedding, naming the first such id."""
    limit = torch.iinfo(torch.int64).max if model is None else vocabulary_size(model)
    outside = (tokens < 0) | (tokens >= limit)
    if outside.any():
        sample, position = outside.nonzero()[0].tolist()
        vocabulary = "any vocabulary" if model is None else f"the model's vocabulary of {limit}"
        raise WandappError(
            f"token id {tokens[sample, position]} at sample {sample}, position {position} is outside {vocabulary}; "
            "use the tokenizer, or the ids, that belong to this model"
        )


def check_seq_len(model: nn.Module | None, seq_len: int) -> None:
    """Raise where the model looks positions up in a table that is shorter than seq_len."""
    positions = model and position_table(model)
    if positions and seq_len > positions:
        raise WandappError(f"the model has {positions} positions, got seq_len {seq_len}; use --seq-len {positions}")


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the model's input embedding."""
    return model.get_input_embeddings().weight.shape[0]


def ids_sha256(tokens: Tensor) -> str:
    """sha256 of the ids as little-endian int64."""
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()


def require_positive(**counts: int | None) -> None:
    """Raise where a count that was given is below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise WandappError(f"{name} must be at least 1, got {count}")
