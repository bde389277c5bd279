"""Text by name: built-in, C4, WikiText-2, any hub dataset, or a file. Calibration and perplexity read from here."""

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wandapp.errors import WandappError, nearest, shorten
from wandapp.memory import free_bytes

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
_MEMORY_OVER_SIZE = 4  # a text is in memory as bytes, as characters and as documents
_SMALL_BYTES, _MOST_SWELLING = 64 << 20, 30  # text shrinks 2 to 10 times; zeros shrink 1000 times
# The canonical raw WikiText-2 test file; https://huggingface.co/datasets/Salesforce/wikitext holds its lines as rows.
_WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


class Corpus(NamedTuple):
    """Documents (None: an empty one), and how they become one text."""

    name: str
    split: str
    documents: Sequence[str | None]
    is_continuous: bool = False  # one text in pieces, which are not drawn from singly
    separator: str = "\n\n"

    @property
    def text(self) -> str:
        return self.separator.join(document or "" for document in self.documents)


def read_corpus(source: str | Path, part: str, text_field: str = "text") -> Corpus:
    """The documents of `source`; `part`, "calibration" or "evaluation", picks the split of a source that has several.

    source      "pydoc" | "c4" | "wikitext2" | "wikitext2:FILE", the raw file | "owner/name[:config]" on the hub, split
                train or test | a file: .txt (one text), .jsonl[.gz], .json.gz, .parquet (documents in `text_field`)
    raises      WandappError on anything unusable, with the way out

    A .txt that is, byte for byte, the canonical raw WikiText-2 test file is read as "wikitext2:FILE".
    """
    source = str(source)
    name, _, option = source.partition(":")
    if name == "wikitext2" and option:
        return _wikitext2_file(existing_file(option))
    if source in _NAMED:
        return _NAMED[source](part)
    if source.endswith(TEXT_SUFFIXES) or os.path.exists(source):
        return _read_file(existing_file(source), text_field)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        return _hub(name, "train" if part == "calibration" else "test", text_field, name=option or None)
    names = [*_NAMED, "self"] if part == "calibration" else _NAMED
    raise WandappError(
        f"{source!r} is no source of text, {nearest(source, names)}; or give a file ({', '.join(TEXT_SUFFIXES)}) or a "
        "hub dataset OWNER/NAME[:CONFIG]"
    )


def builtin_text(part: str) -> str:
    """English text found on every machine: the Python language reference, in two parts without a common paragraph.

    Topics repeat each other ("compound" holds "if", "for", ...): longest topic first, a paragraph counts once, and a
    topic of which less than half is new is left out. Every fourth of the others is for "evaluation", the rest for
    "calibration".
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: list[str] = []
    for topic in sorted(topics.values(), key=lambda topic: (-len(topic), topic)):
        paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", topic) if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in paragraphs)
        text = "\n\n".join(paragraphs).strip("\n")
        if len(text) > len(topic) / 2:
            kept.append(text)
    chosen = {"evaluation": kept[3::4], "calibration": [text for i, text in enumerate(kept) if i % 4 != 3]}
    return "\n\n".join(chosen[part])


def existing_file(path: str | Path) -> Path:
    """`path`, after checking that a file is there."""
    path = Path(path)
    try:
        if path.is_file():
            return path
        reason = "is a folder, give a file" if path.is_dir() else "no such file; check the path"
        if path.exists() and not path.is_dir():
            reason = "neither a file nor a folder; give a file"
    except OSError as error:  # a name that is too long, a folder that may not be searched
        reason = f"cannot be read ({error.strerror}); check the path"
    raise WandappError(f"{shorten(path)}: {reason}")


def first_line(error: Exception) -> str:
    """The first line of another library's message, to quote it inside one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pydoc(part: str) -> Corpus:
    return Corpus("pydoc (the Python language reference)", part, [builtin_text(part)], is_continuous=True)


def _wikitext2(part: str) -> Corpus:
    split = "train" if part == "calibration" else "test"
    rows = _hub("Salesforce/wikitext", split, "text", name="wikitext-2-raw-v1")
    return rows._replace(name=f"wikitext2 ({rows.name})", is_continuous=True)


def _wikitext2_file(path: Path) -> Corpus:
    """The hub's rows from the raw file: its lines, each with its newline, blank lines empty."""
    lines = _read_utf8(path).removesuffix("\n").split("\n")
    rows = [line + "\n" if line.strip() else "" for line in lines]
    return Corpus(f"wikitext2 (rows of {path})", "", rows, is_continuous=True)


def _c4(part: str) -> Corpus:
    """Calibration: the first training shard. Evaluation: the first 1100 validation documents joined by a space, as the
    Wanda authors do (of which they use the first 256 windows of seq_len)."""
    split, shards = ("train", 1024) if part == "calibration" else ("validation", 8)
    file = f"en/c4-{split}.00000-of-{shards:05}.json.gz"
    # Without no_checks, datasets misses the splits that one file does not have.
    shard = _hub("allenai/c4", split, "text", data_files={split: file}, verification_mode="no_checks")
    shard = shard._replace(name=f"c4 (allenai/c4, {file})")
    return shard if part == "calibration" else shard._replace(documents=shard.documents[:1100], separator=" ")


_NAMED = {"pydoc": _pydoc, "c4": _c4, "wikitext2": _wikitext2}


def _hub(dataset: str, split: str, text_field: str, **options: Any) -> Corpus:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(dataset, split=split, **options)
    except (OSError, ValueError, DatasetsError) as error:  # no network; no such dataset, configuration or split
        raise WandappError(
            f"{dataset}: cannot be loaded from the hub ({first_line(error)}); without a network use pydoc, a file "
            f"({', '.join(TEXT_SUFFIXES)}) or, for calibration, self"
        ) from error
    _require_field(dataset, text_field, rows.column_names)
    name = ":".join(filter(None, [dataset, options.get("name")]))
    _require_text(name, text_field, rows.features[text_field].dtype)
    return Corpus(name, split, rows[text_field])


def _read_file(path: Path, text_field: str) -> Corpus:
    if not path.name.endswith(TEXT_SUFFIXES):
        suffix = path.suffix or "no suffix"
        raise WandappError(f"{path}: a text file ends in {', '.join(TEXT_SUFFIXES)}, got {suffix}")
    if path.suffix == ".parquet":
        corpus = Corpus(str(path), "", _parquet_documents(path, text_field))
    elif path.suffix == ".txt":
        text = _read_utf8(path)
        if hashlib.sha256(text.encode()).hexdigest() == _WIKITEXT2_TEST_SHA256:
            return _wikitext2_file(path)
        corpus = Corpus(str(path), "", [text], is_continuous=True)
    else:
        corpus = Corpus(str(path), "", _json_documents(path, text_field))
    if not corpus.text.strip():
        raise WandappError(f"{path} holds no text; give a file with text in it")
    return corpus


def _json_documents(path: Path, text_field: str) -> list[str]:
    documents = []
    for number, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WandappError(
                f"{place}: not JSON ({getattr(error, 'msg', error)}); each line must be one object"
            ) from error
        if not isinstance(row, dict):
            raise WandappError(f"{place}: each line must be one object, got {type(row).__name__}")
        _require_field(place, text_field, row)
        _require_text(place, text_field, type(row[text_field]).__name__)
        if not _is_unicode(row[text_field]):
            raise WandappError(f"{place}: field {text_field!r} holds half a surrogate pair; mend or drop the line")
        documents.append(row[text_field])
    return documents


def _parquet_documents(path: Path, text_field: str) -> list[str | None]:
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        _require_field(str(path), text_field, schema.names)
        if schema.names.count(text_field) > 1:
            raise WandappError(f"{path}: two columns are named {text_field!r}; rename one, or choose with --text-field")
        _require_text(str(path), text_field, str(schema.field(text_field).type))
        return parquet.read_table(path, columns=[text_field]).column(text_field).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise WandappError(
            f"{path} is not a readable .parquet file ({first_line(error)}); write or fetch it again"
        ) from error
    except UnicodeDecodeError as error:
        raise WandappError(
            f"{path}: field {text_field!r} holds text that is not UTF-8 ({error.reason}); convert it first"
        ) from error


def _is_unicode(text: str) -> bool:
    """Whether the text has a UTF-8 form; JSON's \\ud800 has none."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _read_utf8(path: Path) -> str:
    try:
        text = (_decompress(path) if path.suffix == ".gz" else _read_bytes(path)).decode()
    except UnicodeDecodeError as error:
        raise WandappError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise WandappError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error
    _refuse_nul(path, text.find("\0"))
    return text


def _refuse_nul(path: Path, place: int) -> None:
    if place >= 0:
        raise WandappError(f"{path} holds a NUL character at {place}, so it is no text; give a text file")


def _read_bytes(path: Path) -> bytes:
    """The content of a text file, after a look at its beginning and its size: what is no text may be without end."""
    size, free = path.stat().st_size, free_bytes()
    with open(path, "rb") as file:
        beginning = file.read(1 << 20)
        if not beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # of which decoding tells
            _refuse_nul(path, beginning.find(b"\0"))
        if size > free / _MEMORY_OVER_SIZE:
            raise WandappError(
                f"{path}: {size / 2**30:.1f} GiB of text, of which memory takes {free / _MEMORY_OVER_SIZE / 2**30:.1f} GiB at "
                "most; give a part of it"
            )
        return beginning + file.read()


def _decompress(path: Path) -> bytes:
    """The content of a .gz file, unless it swells as no text does: a few megabytes can claim all memory."""
    limit = max(_SMALL_BYTES, _MOST_SWELLING * path.stat().st_size)
    with gzip.open(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise WandappError(
            f"{path} swells to more than {_MOST_SWELLING} times its size; decompress it to show that it is text"
        )
    return data


def _require_field(place: str, field: str, available: Collection[str]) -> None:
    if field not in available:
        names = shorten(", ".join(available)) or "none"
        raise WandappError(f"{place}: no field {field!r}, the fields are: {names}; choose one with --text-field")


def _require_text(place: str, field: str, kind: str) -> None:
    if kind not in ("str", "string", "large_string"):
        raise WandappError(f"{place}: field {field!r} must be text, got {kind}; choose another with --text-field")
