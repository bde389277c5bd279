"""Where blocks live while they are pruned. The pipeline sees `len(store)` and `open_block`, nothing else."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

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
)
from wandapp.errors import WandappError
from wandapp.pattern import SparsityPattern


class ModelStore:
    """Blocks of a model that is in memory; each is moved to `device` while it is in work.

    skip    regular expressions searched in a linear map's dotted name; a map that matches stays dense
    """

    def __init__(self, model: nn.Module, pattern: SparsityPattern, *, skip: tuple[str, ...] = (), device: torch.device):
        self.model, self.device = model, device
        self.prefix, self.blocks = find_blocks(model)
        _refuse_shared_weights(self.blocks, self.prefix)
        self.all_linears = [
            find_linears(block, f"{self.prefix}.{index}", skip) for index, block in enumerate(self.blocks)
        ]
        self.linears = [_without_skipped(linears, skip) for linears in self.all_linears]
        _refuse_useless_skips(self.all_linears, skip)
        for linears in self.linears:
            for view in linears.values():
                pattern.require_fit(view.name, view.weight.shape[1])
        self.recording: Recording | None = None
        self.attention_flops_per_token = 0.0

    def __len__(self) -> int:
        return len(self.blocks)

    def kept_dense(self) -> list[str]:
        """Linear maps that a skip expression excludes."""
        pairs = zip(self.all_linears, self.linears, strict=True)
        return [name for every, pruned in pairs for name in every if name not in pruned]

    def record(self, tokens: Tensor, batch_size: int) -> Tensor:
        """Records every block's call arguments; returns the first block's inputs [samples, seq_len, hidden_size]."""
        self.batch_size = batch_size
        self.recording = record(self.model, self.blocks, tokens, batch_size)
        self.attention_flops_per_token = _attention_flops_per_token(self.model.config, tokens.shape[1])
        self._moved: dict[int, Tensor] = {}
        return self.recording.hidden.to(self.device)

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

    @contextmanager
    def open_block(self, index: int) -> Iterator[DecoderBlock]:
        """The block, on the work device; leaving puts it back where it was."""
        module = self.blocks[index]
        home = next(module.parameters()).device
        module.to(self.device)
        calls = {size: call.to(self.device, self._moved) for size, call in self.recording.calls[index].items()}
        name = f"{self.prefix}.{index}"
        try:
            yield DecoderBlock(
                index, name, module, self.linears[index], calls, self.all_linears[index], self.attention_flops_per_token
            )
        finally:
            module.to(home)


def _attention_flops_per_token(config, seq_len: int) -> float:
    """Q K^T and P V of one block for one token, over the whole square as torch's FLOP counter counts it: 4 * T * heads * d."""
    fields = config.get_text_config().to_dict()
    heads = fields.get("num_attention_heads") or fields.get("n_head") or 0
    hidden = fields.get("hidden_size") or fields.get("n_embd") or 0
    head_size = fields.get("head_dim") or (hidden // heads if heads else 0)
    return 4.0 * seq_len * heads * head_size


def _without_skipped(linears: dict, skip: tuple[str, ...]) -> dict:
    return {name: view for name, view in linears.items() if not any(re.search(pattern, name) for pattern in skip)}


def _refuse_useless_skips(all_linears: list[dict], skip: tuple[str, ...]) -> None:
    names = [name for linears in all_linears for name in linears]
    for pattern in skip:
        if not any(re.search(pattern, name) for name in names):
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
