"""safetensors files read and written a tensor at a time, through buffers of our own.

The usual reader maps files, whose pages count as this process's memory as long as a tensor looks at them; the usual writer
copies everything it writes. Here `read` fills one new tensor from the file and `write_shard` holds no copy.
"""

import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from io import RawIOBase
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wandapp.errors import WandappError
from wandapp.weight_files import DTYPES, read_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StoredTensor(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardReader:
    """Tensors of several safetensors files by name.

    raises  WandappError on a file that is no safetensors, is truncated, or repeats another's tensor
    """

    def __init__(self, paths: Iterable[Path]):
        self.tensors: dict[str, StoredTensor] = {}
        for path in paths:
            header, start = read_header(path)
            for name, entry in header.items():
                if name in self.tensors:
                    raise WandappError(f"{path}: the tensor {name} is also in {self.tensors[name].path.name}")
                if entry["dtype"] not in DTYPES:
                    raise WandappError(f"{path}: {name} has the type {entry['dtype']}, which wandapp does not read")
                place = start + entry["data_offsets"][0]
                self.tensors[name] = StoredTensor(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), place)

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        try:
            with open(stored.path, "rb", buffering=0) as file:
                file.seek(stored.offset)
                _fill(_bytes(tensor), file)
        except OSError as error:
            raise WandappError(f"{stored.path}: cannot be read ({error.strerror}); check the disk") from error
        except EOFError:
            raise WandappError(f"{stored.path}: shorter than it was when the run began; fetch it again") from None
        return tensor


def shard_metadata(path: Path) -> dict[str, str]:
    """The text that `write_shard` was given."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WandappError(f"{path}: corrupt or incomplete ({' '.join(str(error).split())}); delete it") from None


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write one safetensors file durably: under a temporary name, flushed to the disk, renamed. Returns its bytes.

    raises  OSError where the disk refuses; then the file is absent or as it was
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # so every tensor is aligned
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb", buffering=0) as file:
            _write(file, struct.pack("<Q", len(text)) + text)
            for name in list(header)[1:]:
                _write(file, _bytes(tensors[name].detach().to("cpu").contiguous()))
            os.fsync(file.fileno())
        unfinished.rename(path)
        _flush_folder(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return 8 + len(text) + end


def write_index(folder: Path, paths: Iterable[Path]) -> None:
    """Write the file that says which of a checkpoint's files holds each tensor."""
    stored = ShardReader(paths).tensors
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
        "weight_map": {name: stored[name].path.name for name in sorted(stored)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill(buffer: memoryview, file: RawIOBase) -> None:
    """Read until the buffer is full; one call reads at most 2 GiB."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done : done + (1 << 30)])
        if not count:
            raise EOFError
        done += count


def _write(file: RawIOBase, data: bytes | memoryview) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += file.write(view[done : done + (1 << 30)])


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_tensor(folder: Path | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that live in a nameless file in `folder` (None: the system's temporary one) and vanish with this process.

    Room is taken at once: writing to a mapped file that finds the disk full would kill the process.
    """
    nbytes = max(math.prod(shape) * dtype.itemsize, 1)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            for start in range(0, nbytes, 1 << 24):
                file.write(bytes(min(1 << 24, nbytes - start)))
            file.flush()
        mapped = mmap.mmap(file.fileno(), nbytes)
    return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape)).view(shape)
