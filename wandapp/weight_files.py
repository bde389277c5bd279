"""The files of a checkpoint folder, checked before anything is made of them: config.json, the index, the headers.

Nothing here follows a name out of the folder, unpickles, or takes memory for what a file merely claims.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wandapp.errors import WandappError, shorten
from wandapp.small_file import read_small

PACKED_MANIFEST = "wandapp/packed.json"  # in the folder of a packed checkpoint
MAX_JSON_BYTES = 32 << 20  # an index of a million tensors is smaller
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX = "model.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    },
}
FLOATING = ("F64", "F32", "BF16", "F16")


class TensorInfo(NamedTuple):
    path: Path
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFiles:
    """Tensors of several safetensors files by name, read one at a time.

    raises  WandappError on a file that is no safetensors, is truncated, or repeats another's tensor
    """

    def __init__(self, paths: Iterable[Path]):
        self.infos: dict[str, TensorInfo] = {}
        for path in paths:
            for name, entry in read_header(path)[0].items():
                if not re.fullmatch("[!-~]{1,300}", name):
                    raise WandappError(
                        f"{path}: a tensor is named {name[:80]!r}; a name has 1 to 300 characters, all printable ASCII"
                    )
                if name in self.infos:
                    raise WandappError(f"{path}: the tensor {shorten(name)} is also in {self.infos[name].path.name}")
                self.infos[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]))

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file: memory is only taken for what is looked at, until it is dropped."""
        path, dtype, shape = self.infos[name]
        if dtype not in DTYPES:
            raise WandappError(f"{path}: {name} has the type {dtype}, which wandapp does not read")
        with _readable(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name)


class _readable:
    """Turns what a damaged file makes its reader raise into one sentence."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (SafetensorError, OSError)):
            reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
            reason = "a folder" if self.path.is_dir() else shorten(reason)
            raise WandappError(f"{self.path}: corrupt or incomplete ({reason}); fetch or pack it again") from None


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """A safetensors file's header, {name: {"dtype", "shape", "data_offsets"}}, and where the tensors' bytes begin.

    raises  WandappError where header and bytes disagree, by safetensors' own check, or a name comes twice
    """

    def once(pairs: list[tuple[str, object]]) -> dict:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise WandappError(f"{path}: its header names {shorten(repr(name))} twice; fetch it again")
            seen.add(name)
        return dict(pairs)

    with _readable(path), safe_open(path, framework="pt"), open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=once)
    header.pop("__metadata__", None)
    return header, 8 + length


def refuse_special_files(place: Path, way_out: str = "fetch the checkpoint again") -> None:
    """Raise where `place`, or what lies in that folder, is a pipe or a device: reading it may never end."""
    for path in [place, *place.glob("*"), *place.glob("wandapp/*")]:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise WandappError(f"{path}: neither a file nor a folder; {way_out}")
        if path.suffix == ".json" and path.is_dir():  # readers would pass over it
            raise WandappError(f"{path}: a folder, where a file is expected; {way_out}")


def is_packed(folder: str | Path) -> bool:
    """Whether `folder` holds a packed checkpoint, which `load_model` refuses and `wandapp.load_sparse` reads."""
    return (Path(folder) / PACKED_MANIFEST).is_file()


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of a dense checkpoint, after a check that each is present, safetensors and complete."""
    return sorted({info.path for info in checkpoint_tensors(folder).infos.values()})


def checkpoint_tensors(folder: Path) -> TensorFiles:
    """The tensors of a dense checkpoint by name, from the headers of its files.

    raises  WandappError on a folder without config.json or safetensors, a pickled or packed checkpoint, an index that
            leaves the folder or disagrees with the files, a file that is cut short, a tensor that comes twice
    """
    refuse_special_files(folder)
    if not (folder / "config.json").is_file():
        raise WandappError(f"{folder}: a model folder holds config.json, and this one does not; check the path")
    read_json(folder / "config.json", "the model's configuration")
    if is_packed(folder):
        raise WandappError(
            f"{folder}: a packed checkpoint; read it with wandapp.load_sparse, or wandapp unpack it first"
        )
    index = folder / _INDEX
    weight_map = _weight_map(index) if index.exists() or index.is_symlink() else None
    names = sorted(set(weight_map.values())) if weight_map else [path.name for path in folder.glob("*.safetensors")]
    if not names:
        refuse_pickles(folder)
        raise WandappError(f"{folder}: no *.safetensors file in this folder; download the checkpoint's weights")
    files = TensorFiles(folder / name for name in sorted(names))
    for name, file in (weight_map or {}).items():
        if name not in files.infos or files.infos[name].path.name != file:
            raise WandappError(f"{index}: says that {shorten(name)} is in {file}, and it is not; download both again")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """File of each tensor, as the index says; only names of safetensors files in the index's own folder."""
    weight_map = read_json(index, "an index of weight files").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WandappError(f"{index}: not a valid index of weight files, which has a 'weight_map'; download it again")
    for file in weight_map.values():
        if not isinstance(file, str):
            raise WandappError(
                f"{index}: not a valid index of weight files, it names {shorten(file)}; download it again"
            )
        if file.endswith(PICKLES):
            raise WandappError(f"{index}: names {shorten(file)}; {_PICKLES_REFUSED}")
        if not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", file):
            raise WandappError(
                f"{index}: names {shorten(repr(file))}, which is no file of this folder; download the index again"
            )
    return weight_map


_PICKLES_REFUSED = (
    "pickled weights may run code when read and are refused; convert the checkpoint with save_pretrained(folder), which "
    "writes safetensors, on a machine where you trust it"
)


def refuse_pickles(path: Path) -> None:
    """Raise where `path` is a pickled file, or a folder that holds one."""
    pickles = [file for file in [path, *(path.iterdir() if path.is_dir() else [])] if file.name.endswith(PICKLES)]
    if pickles:
        raise WandappError(f"{min(pickles)}: {_PICKLES_REFUSED}")


def _without_contradiction(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these members; of two with one name and other values a reader takes either."""
    members = dict(pairs)
    if len(members) < len(pairs):
        for name, value in pairs:
            if members[name] != value:
                raise ValueError(f"it says {shorten(repr(name))} twice, with other values")
    return members


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file of at most MAX_JSON_BYTES; `what` names it in messages, e.g. "an index of weight files"."""
    try:
        data = read_small(path, MAX_JSON_BYTES)
    except OSError as error:
        raise WandappError(f"{path}: {what} cannot be read ({error.strerror}); check the path") from None
    if len(data) > MAX_JSON_BYTES:
        raise WandappError(f"{path}: larger than {MAX_JSON_BYTES} bytes, so it is not {what}; download it again")
    try:
        value = json.loads(data, object_pairs_hook=_without_contradiction)
    except (ValueError, RecursionError) as error:
        reason = shorten(" ".join(str(error).split()))
        raise WandappError(f"{path}: not valid JSON, so not {what} ({reason}); download it again") from None
    if not isinstance(value, dict):
        raise WandappError(f"{path}: not a valid JSON object, so not {what}; download it again")
    return value
