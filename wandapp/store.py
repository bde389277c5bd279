"""Where blocks live while they are pruned: `ModelStore` in memory; `ShardStore` (shard_store.py) on the disk.

The pipeline opens one block after another and keeps each when it is pruned. What "keep" means is the run folder's matter:
without one (`wandapp.prune` on a model in memory) the block is simply left as it is.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wandapp.blocks import (
    DecoderBlock,
    Recording,
    UnsupportedLayoutError,
    find_blocks,
    find_linears,
    forward_from,
    record,
    unknown_weights,
)
from wandapp.checkpoint import block_tensors, outer_tensors, place
from wandapp.errors import WandappError
from wandapp.methods.base import BlockRecord
from wandapp.pattern import SparsityPattern
from wandapp.run_folder import RunFolder


class ModelStore:
    """Blocks of a model that is in memory; each is moved to `device` while it is in work.

    skip    regular expressions searched in a linear map's dotted name; a map that matches stays dense
    run     where pruned blocks are written as soon as they are done; None: they stay in the model
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: SparsityPattern,
        *,
        skip: tuple[str, ...] = (),
        device: torch.device,
        run: RunFolder | None = None,
    ):
        self.model, self.device, self.skip, self.run = model, device, skip, run
        self.prefix, self.blocks = find_blocks(model)
        _refuse_shared_weights(self.blocks, self.prefix)
        self.all_linears = [
            find_linears(block, f"{self.prefix}.{index}", skip) for index, block in enumerate(self.blocks)
        ]
        self.linears = [_without_skipped(linears, skip) for linears in self.all_linears]
        _refuse_useless_skips(self.all_linears, self._unknown_weights(), skip)
        for linears in self.linears:
            for view in linears.values():
                pattern.require_fit(view.name, view.weight.shape[1])
        # What each block learns of how many tokens meet its experts.
        self._macs_per_token: list[dict[str, float]] = [{} for _ in self.blocks]
        self.recording: Recording | None = None
        self.attention_flops_per_token = 0.0

    def __len__(self) -> int:
        return len(self.blocks)

    def _unknown_weights(self) -> list[str]:
        """Weights that are no linear maps, which a skip expression excuses."""
        named = ((block, f"{self.prefix}.{index}") for index, block in enumerate(self.blocks))
        return [name for block, prefix in named for name in unknown_weights(block, prefix)]

    def kept_dense(self) -> tuple[list[str], int]:
        """Linear maps that a skip expression excludes, and the number of their weights."""
        pairs = zip(self.all_linears, self.linears, strict=True)
        kept = {name: view for every, pruned in pairs for name, view in every.items() if name not in pruned}
        return list(kept), sum(view.weight.numel() for view in kept.values())

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """The model on the work device; leaving puts it back where it was."""
        homes = {parameter.device for parameter in self.model.parameters()}
        if homes <= {self.device} or len(homes) > 1:  # there already, or spread over devices by whoever loaded it
            yield self.model
            return
        try:
            yield self.model.to(self.device)
        finally:
            self.model.to(homes.pop())

    def record(self, tokens: Tensor, batch_size: int) -> Tensor:
        """Records every block's call arguments; returns the first block's inputs [samples, seq_len, hidden_size]."""
        self.batch_size = batch_size
        self.recording = record(self.model, self.blocks, tokens, batch_size, allocate=self._allocate)
        self.attention_flops_per_token = attention_flops_per_token(self.model.config, tokens.shape[1])
        self._moved: dict[int, Tensor] = {}
        return self.recording.hidden if self._states_on_disk else self.recording.hidden.to(self.device)

    def copy(self, hidden: Tensor) -> Tensor:
        """A second set of hidden states, in memory or on the disk as the first."""
        return (
            self._allocate(tuple(hidden.shape), hidden.dtype).copy_(hidden) if self._states_on_disk else hidden.clone()
        )

    @property
    def _states_on_disk(self) -> bool:
        return self.run is not None and self.run.config.activations == "disk"

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.run.disk_tensor(shape, dtype) if self._states_on_disk else torch.empty(shape, dtype=dtype)

    def loss_gradient(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of the summed per-sample mean next-token loss by the last block's outputs hidden [samples, seq_len, ..]."""
        home = next(self.model.parameters()).device
        leaf = hidden.detach().to(home).requires_grad_(True)
        with torch.enable_grad():
            logits = forward_from(self.model, self.blocks, tokens.to(home), leaf)[
                :, :-1
            ].float()  # [samples, seq_len - 1, vocab]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(home), reduction="sum")
            (loss / (tokens.shape[1] - 1)).backward()
        return leaf.grad.to(self.device)

    def divergence(self, tokens: Tensor, hidden: Tensor, dense: Tensor) -> Tensor:
        """Sum over tokens [samples, seq_len] of KL(p || q), p and q the next token's distribution after `dense` and `hidden`.

        hidden, dense   [samples, seq_len, hidden_size] the last block's outputs; gradients flow to hidden
        """
        home = next(self.model.parameters()).device

        def log_probabilities(states: Tensor) -> Tensor:
            return forward_from(self.model, self.blocks, tokens.to(home), states.to(home)).float().log_softmax(-1)

        with torch.no_grad():
            expected = log_probabilities(dense)
        return nn.functional.kl_div(log_probabilities(hidden), expected, reduction="sum", log_target=True)

    @contextmanager
    def open_block(self, index: int, *, pruned: bool = False) -> Iterator[DecoderBlock]:
        """The block, on the work device; leaving puts it back where it was.

        pruned   as an earlier run finished it, instead of the dense one
        """
        module = self.blocks[index]
        home = next(module.parameters()).device
        if pruned:
            place(self.model, self._finished(index), str(self.run.partial))
        module.to(self.device)
        try:
            yield self._present(index)
            self._settle()
        finally:
            module.to(home)

    def _present(self, index: int) -> DecoderBlock:
        """The block whose parameters are in place."""
        name, module = f"{self.prefix}.{index}", self.blocks[index].requires_grad_(False)
        linears = find_linears(module, name, self.skip)
        calls = {size: call.to(self.device, self._moved) for size, call in self.recording.calls[index].items()}
        pruned = _without_skipped(linears, self.skip)
        return DecoderBlock(
            index,
            name,
            module,
            pruned,
            calls,
            linears,
            self.attention_flops_per_token,
            heads=query_heads(self.model.config),
            _macs_per_token=self._macs_per_token[index],
        )

    def _finished(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block that an earlier run finished."""
        return self.run.read(index, like=block_tensors(self.model, self.prefix, index))

    def finished(self, index: int) -> BlockRecord | None:
        """The report of a block that an earlier, interrupted run finished; its weights come with `open_block(pruned=True)`."""
        return self.run.finished(index) if self.run else None

    @property
    def done(self) -> int:
        """Leading blocks that an earlier run finished."""
        return self.run.done if self.run else 0

    def keep(self, block: DecoderBlock, record: BlockRecord) -> None:
        """Begins to write a pruned block; leaving it waits until it is safe on the disk."""
        if self.run:
            self.run.keep(block.index, lambda: block_tensors(self.model, self.prefix, block.index), record)

    def _settle(self) -> None:
        if self.run:
            self.run.wait()

    @property
    def io_seconds(self) -> float:
        """Time that the work has stood still for the disk."""
        return self.run.io_seconds if self.run else 0.0

    @contextmanager
    def outer(self) -> Iterator[dict[str, Any]]:
        """The checkpoint's tensors outside the blocks."""
        yield outer_tensors(self.model, self.prefix)


def attention_flops_per_token(config: Any, seq_len: int) -> float:
    """Q K^T and P V of one block for one token, over the whole square as torch's FLOP counter counts it: 4 * T * heads * d."""
    return 4.0 * seq_len * query_heads(config) * _head_size(config)


def key_value_width(config: Any) -> int:
    """Width of the keys, and of the values, that a block remembers of one token; 0 where the config gives no such number."""
    return (_number(config, "num_key_value_heads") or query_heads(config)) * _head_size(config)


def query_heads(config: Any) -> int:
    """Query heads of a block's attention; 0 where the config gives no such number."""
    return _number(config, "num_attention_heads")


def _head_size(config: Any) -> int:
    heads = query_heads(config)
    return _number(config, "head_dim") or (_number(config, "hidden_size") // heads if heads else 0)


def _number(config: Any, name: str) -> int:
    """A field of the text model's configuration by its usual name, which a family may map to its own; 0 where it has none."""
    value = getattr(config.get_text_config(), name, None)
    return value if isinstance(value, int) else 0


def _without_skipped(linears: dict, skip: tuple[str, ...]) -> dict:
    return {name: view for name, view in linears.items() if not any(re.search(pattern, name) for pattern in skip)}


def _refuse_useless_skips(all_linears: list[dict], excused: list[str], skip: tuple[str, ...]) -> None:
    names = [name for linears in all_linears for name in linears]
    for pattern in skip:
        if not any(re.search(pattern, name) for name in (*names, *excused)):
            raise WandappError(f"--skip {pattern!r} matches no linear map; names look like {names[0]} and {names[-1]}")
    if all(any(re.search(pattern, name) for pattern in skip) for name in names):
        raise WandappError(f"--skip {' '.join(skip)} leaves no linear map to prune; there are {len(names)}")


def _refuse_shared_weights(blocks: nn.ModuleList, prefix: str) -> None:
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            first = owner.setdefault(id(parameter), index)
            if first != index:
                raise UnsupportedLayoutError(
                    f"{prefix}.{index}.{name}: shares its weight with block {first}; models whose blocks share weights are "
                    "not supported, since pruning the second would change the first"
                )
