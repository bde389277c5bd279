"""Blocks that live on the disk: one is in memory while it is pruned, and the next is read meanwhile."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock
from wandapp.checkpoint import OUTER, Checkpoint, forget, outer_tensors, place
from wandapp.memory import give_back
from wandapp.pattern import SparsityPattern
from wandapp.run_folder import RunFolder
from wandapp.store import ModelStore


class ShardStore(ModelStore):
    """`ModelStore` for a model whose weights stay in the checkpoint's files until their block is opened.

    Embeddings and head are in memory while calls are recorded, at GBLM's loss, and at the end when they are written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pattern: SparsityPattern,
        *,
        skip: tuple[str, ...] = (),
        device: torch.device,
        run: RunFolder,
    ):
        super().__init__(checkpoint.model, pattern, skip=skip, device=device, run=run)
        self.checkpoint = checkpoint
        self.read_seconds = 0.0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="wandapp-read")
        self._ahead: tuple[tuple[int, bool], Future] | None = None
        self._previous = -1

    def record(self, tokens: Tensor, batch_size: int) -> Tensor:
        with self._placed(OUTER, 0):  # the first block shows in what form blocks return their output
            return super().record(tokens, batch_size)

    def loss_gradient(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        with self._placed(OUTER, 0):
            return super().loss_gradient(tokens, hidden)

    @contextmanager
    def outer(self) -> Iterator[dict[str, Any]]:
        with self._placed(OUTER):
            yield outer_tensors(self.model, self.prefix)

    @contextmanager
    def _placed(self, *parts: int) -> Iterator[None]:
        """These parts of the model in memory, on the CPU."""
        for part in parts:
            place(self.model, self.checkpoint.read(part), self.checkpoint.source)
        absent = {name for name, value in self.model.state_dict().items() if value.is_meta}
        self.model.tie_weights(missing_keys=absent, recompute_mapping=False)
        self.model.requires_grad_(False)
        try:
            yield
        finally:
            forget(self.model)
            give_back()

    @contextmanager
    def open_block(self, index: int, *, pruned: bool = False) -> Iterator[DecoderBlock]:
        module = self.blocks[index]
        place(self.model, self._take(index, pruned), self.checkpoint.source)
        self._read_ahead(index, pruned)
        try:
            yield self._present(index)
            self._settle()
        finally:
            forget(module)
            give_back()

    @property
    def io_seconds(self) -> float:
        return self.read_seconds + super().io_seconds

    def _take(self, index: int, pruned: bool) -> dict[str, Tensor]:
        """A block's tensors on the work device: those read ahead, where the guess was right."""
        start = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == (index, pruned):
            tensors = ahead[1].result()
        else:
            if ahead:
                ahead[1].cancel() or ahead[1].result()
            del ahead
            tensors = self._read(index, pruned)
        self.read_seconds += time.perf_counter() - start
        return tensors

    def _read_ahead(self, index: int, pruned: bool) -> None:
        """Begins to read the next block in the direction of travel; GBLM goes backwards too."""
        following, self._previous = 2 * index - self._previous, index
        if 0 <= following < len(self) and following != index:
            key = (following, pruned and following < self.done)
            self._ahead = key, self._reader.submit(self._read, *key)

    def _read(self, index: int, pruned: bool) -> dict[str, Tensor]:
        tensors = self._finished(index) if pruned else self.checkpoint.read(index)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}
