"""Gradients of the dense model, kept in a folder for other runs: they depend on neither pattern, alpha nor refiner.

    FOLDER/KEY/00003.safetensors    the gradients' sums of block 3, by linear map

KEY hashes what they do depend on, by content: every weight of the blocks, the configuration that says how they compute, the
first block's inputs (which the embedding makes), the loss gradient of one sample (which the final norm and the head make),
the tokens, and how samples are joined.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wandapp.errors import WandappError
from wandapp.methods.base import BlockStore

_NAMES = {"_name_or_path", "transformers_version"}  # of a model's configuration, which compute nothing


class GradientCache:
    """The entry of one dense model and its calibration tokens in `folder`."""

    def __init__(self, folder: str | Path, store: BlockStore, tokens: Tensor, hidden: Tensor, kind: str):
        self.names = [[view.name for view in linears.values()] for linears in store.linears]
        self.path = Path(folder) / _key(store, tokens, hidden, kind)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Other processes that want this entry wait: one computes, the others read."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(f"{self.path}.lock", "w")
        except OSError as error:
            raise WandappError(
                f"{self.path.parent}: no place for gradients ({error.strerror}); choose another"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self) -> dict[str, Tensor] | None:
        """The sums [out_features, in_features] fp32 by linear map, mapped from the files; None where there is no entry."""
        if not self.path.is_dir():
            return None
        sums: dict[str, Tensor] = {}
        for path in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    sums |= {name: file.get_tensor(name) for name in file.keys()}
            except (SafetensorError, OSError) as error:
                raise WandappError(f"{path}: corrupt or incomplete ({error}); delete {self.path}") from None
        return sums

    def write(self, sums: dict[str, Tensor]) -> None:
        """Makes the entry: complete, or not at all. A linear map without gradient is left out."""
        partial = Path(f"{self.path}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir()
            for index, names in enumerate(self.names):
                save_file({name: sums[name] for name in names if name in sums}, partial / f"{index:05}.safetensors")
            partial.rename(self.path)
        except (SafetensorError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise WandappError(
                f"{self.path}: the gradients could not be kept ({error}); make room, or leave gblm_cache out"
            ) from error


def _key(store: BlockStore, tokens: Tensor, hidden: Tensor, kind: str) -> str:
    computed = {name: value for name, value in store.model.config.to_dict().items() if name not in _NAMES}
    computed_so = json.dumps(computed, sort_keys=True, default=str)
    sha = hashlib.sha256(f"{kind} {store.batch_size} {hidden.device.type} {hidden.dtype} {computed_so}".encode())
    for tensor in (tokens, hidden, store.loss_gradient(tokens[:1], hidden[:1])):
        _update(sha, tensor)
    for index in range(len(store)):
        with store.open_block(index) as block:
            sha.update(" ".join(block.linears).encode())
            for name, parameter in sorted(block.module.named_parameters()):
                sha.update(f"{name} {tuple(parameter.shape)}".encode())
                _update(sha, parameter)
    return sha.hexdigest()[:32]


def _update(sha: "hashlib._Hash", tensor: Tensor) -> None:
    sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
