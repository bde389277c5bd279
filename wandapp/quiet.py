"""transformers without its warnings and bars, and what it raises on a damaged checkpoint as one sentence."""

import io
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from wandapp.errors import shorten

# What the readers of a damaged file raise; anything else is a mistake of ours and keeps its traceback.
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError, ArithmeticError),
    *(MemoryError, AssertionError, struct.error, SafetensorError, StrictDataclassError),
)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings and bars; what matters in them is raised or reported by us.

    One bar (of the GGUF reader) cannot be turned off, so on a terminal it stays and elsewhere stderr is set aside.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def why_not_loaded(reference: str, error: Exception) -> str:
    """One sentence about a checkpoint that raised one of LOAD_ERRORS."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "ignore_mismatched_sizes" in reason:  # the report that it speaks of is in the log, which is set aside
        reason = "its tensors are not of the shapes that it says the model has"
    if Path(reference).expanduser().exists() or reference == "smollm2":
        return f"{reference}: cannot be loaded as a causal language model ({shorten(reason)}); check the checkpoint"
    return (
        f"{reference}: neither a local folder nor a hub model that can be fetched ({shorten(reason)}); check the name "
        "and the connection, or give a local folder"
    )
