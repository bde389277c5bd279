"""The Hugging Face hub: a model by its id, with or without a network, and a checkpoint of ours uploaded."""

import json
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from wandapp.errors import WandappError, nearest_folder

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "wandapp/*"]
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "*.gguf"]  # the weights again, in another form
# Of the hub's client: answers, names, and (the class beneath its own, of httpx or httpx2) a network that fails.
_FAILURES: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    HfHubHTTPError,
    cast(type[Exception], HfHubHTTPError.__mro__[1]),
)


def download(repo: str) -> Path:
    """Folder in the hub's cache with config, tokenizer and safetensors weights of `repo`; fetched where it is not there yet.

    Bars are drawn on a terminal only. Without a network, or with HF_HUB_OFFLINE set, the cache alone is used.

    raises  WandappError that says what is missing, and why it cannot be fetched
    """
    offline = _why_offline()
    try:
        with _bars_on_a_terminal():
            folder = Path(
                snapshot_download(
                    repo, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=offline is not None
                )
            )
    except GatedRepoError:
        raise WandappError(
            f"{repo}: the hub asks for its licence to be accepted; do so on its page, and log in"
        ) from None
    except _FAILURES as error:
        folder = Path(getattr(error, "snapshot_path", ""))  # of a part of it in the cache, where that is why it failed
        if folder == Path():
            why = offline or _first_line(error)
            hint = nearest_folder(Path(repo), ["smollm2"])
            kept = f"and the cache {constants.HF_HUB_CACHE} holds nothing of it" if offline else ""
            raise WandappError(
                f"{repo}: neither a local folder nor a hub model that can be fetched "
                f"({' '.join(filter(None, (why, kept)))}); check the name and the connection, or give a local "
                f"folder{hint and '; ' + hint}"
            ) from error
    if missing := missing_files(folder):
        raise WandappError(
            f"{repo}: {len(missing)} files are not in {folder}: {', '.join(missing[:5])}"
            + (
                f" ({offline}); connect once to fetch them"
                if offline
                else "; the hub has no safetensors weights for it"
            )
        )
    return folder


def missing_files(folder: Path) -> list[str]:
    """Names of what a checkpoint needs and `folder` has not: its config, and the weight files its index names."""
    index = folder / "model.safetensors.index.json"
    needed = {"config.json"}
    if index.is_file():
        try:
            needed |= set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            needed.add(f"{index.name} (this one is damaged)")
    elif not any(folder.glob("*.safetensors")):
        needed.add("model.safetensors")
    return sorted(name for name in needed if not (folder / name).is_file())


def check_push(repo: str) -> None:
    """Raises unless `push` could upload to `repo`, as far as that shows beforehand: name, network, log-in."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise WandappError(f"{repo}: a hub repository is OWNER/NAME")
    if offline := _why_offline():
        raise WandappError(f"{repo}: the hub cannot be reached ({offline})")
    with _explained(repo):
        HfApi().whoami()


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Uploads the checkpoint in `folder` to the hub's model repository `repo`, made where it is not; its address."""
    check_push(repo)
    with _explained(repo), _bars_on_a_terminal():
        api = HfApi()
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a checkpoint made by wandapp")
    return str(url)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns what the hub's client raises into one sentence."""
    try:
        yield
    except RepositoryNotFoundError:
        raise WandappError(f"{repo}: the hub does not let this account write there; check the owner's name") from None
    except _FAILURES as error:
        hint = "; log in with: hf auth login" if re.search("401|logged in|token", str(error)) else ""
        raise WandappError(f"{repo}: cannot be uploaded ({_first_line(error)}){hint}") from error


def _why_offline() -> str | None:
    """Why the hub's client should not even try: it would retry for half a minute before it looks at its cache."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    if urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"no network: {host} has no address here"
    return None


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    silent = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
