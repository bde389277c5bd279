"""Text in and out of a model: its tokenizer, and its most likely continuation of a prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from wandapp.blocks import position_table
from wandapp.errors import WandappError, shorten
from wandapp.locate import locate
from wandapp.quiet import LOAD_ERRORS, quiet_transformers

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def tokenizer_of(reference: str) -> Any | None:
    """The tokenizer of whatever `load_model` reads, without its weights; None where there is none."""
    place, gguf_file = locate(reference)
    with quiet_transformers():
        return tokenizer_in(reference, place, gguf_file)


def load_tokenizer(folder: str | Path) -> Any | None:
    """The tokenizer whose files lie in `folder`, or that a .gguf file holds, or None where there is none."""
    place, gguf_file = (folder, None) if Path(folder).is_dir() else (Path(folder).parent, Path(folder).name)
    with quiet_transformers():
        return tokenizer_in(str(folder), str(place), gguf_file)


def tokenizer_in(reference: str, place: str, gguf_file: str | None) -> Any | None:
    """The tokenizer in the folder `place`, or in its `gguf_file`; None where the folder has none. `reference` is for errors."""
    folder = Path(place)
    if folder.is_dir() and not gguf_file and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    options = {"gguf_file": gguf_file} if gguf_file else {}
    with tokenizer_errors(f"{reference}: the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def tokenizer_errors(problem: str) -> Iterator[None]:
    """Turns what a damaged tokenizer raises into one sentence. The package tokenizers has no class but Exception itself."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, LOAD_ERRORS) and type(error) is not Exception:
            raise
        reason = shorten(" ".join(str(error).split()))
        raise WandappError(f"{problem} ({reason}); check its files") from error


def check_room(model: nn.Module, prompt: int, new: int, option: str) -> None:
    """Raise where the model looks positions up in a table that is shorter than a prompt and its continuation."""
    positions = position_table(model)
    if positions and prompt + new > positions:
        raise WandappError(
            f"the model has {positions} positions, got a prompt of {prompt} tokens and {new} new ones; use {option} "
            f"{max(positions - prompt, 1)}" + (", and a shorter prompt" if prompt >= positions else "")
        )


def generate(model: nn.Module, tokenizer: Any | None, prompt: str, max_new_tokens: int) -> str:
    """The model's most likely continuation of `prompt`, without the prompt."""
    if tokenizer is None:
        raise WandappError(
            "text needs a tokenizer, and this checkpoint has none; copy the base model's tokenizer beside it"
        )
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    if tokens["input_ids"].numel() == 0:
        raise WandappError(f"the prompt {prompt!r} has no tokens; give some text")
    check_room(model, tokens["input_ids"].shape[1], max_new_tokens, "--max-new-tokens")
    with torch.inference_mode(), quiet_transformers():
        written = model.generate(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
        )
    return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
