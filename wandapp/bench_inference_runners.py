"""What `wandapp bench inference` times: models that read a prompt and continue it, and how they take turns."""

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Runner(Protocol):
    """A model that reads a prompt [batch, tokens] and continues it."""

    max_batch: int

    def prefill(self, tokens: Tensor) -> None: ...

    def generate(self, tokens: Tensor, new_tokens: int) -> tuple[Tensor, list[float]]: ...


class TorchModel:
    """A transformers model, run by its own `generate`."""

    max_batch = sys.maxsize

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> None:
        self.model(tokens, logits_to_keep=1)
        wait_for(tokens.device)

    def generate(self, tokens: Tensor, new_tokens: int) -> tuple[Tensor, list[float]]:
        """Greedy continuation [batch, new_tokens], and the milliseconds from each forward's end to the next one's."""
        ends: list[float] = []

        def on_forward(*_: Any) -> None:
            wait_for(tokens.device)
            ends.append(time.perf_counter())

        hook = self.model.register_forward_hook(on_forward)
        try:
            with torch.inference_mode():
                written = self.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
        finally:
            hook.remove()
        return written[:, tokens.shape[1] :], [(later - earlier) * 1e3 for earlier, later in pairwise(ends)]


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    runners: dict[str, Runner], rounds: int, measure: Callable[[Runner], list[float]]
) -> dict[str, list[float]]:
    """What `measure` finds in `rounds` rounds, by runner. They take turns, so that a machine that drifts drifts for all."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):  # the first turn warms up
        for name, runner in runners.items():
            found = measure(runner)
            if turn:
                taken[name] += found
    return taken


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def agreement(reference: Runner, other: Runner, tokens: Tensor, new_tokens: int) -> dict[str, float]:
    """How far the two write the same: a text that has parted once does not come together again."""
    tokens = tokens[: other.max_batch]
    together = (reference.generate(tokens, new_tokens)[0] == other.generate(tokens, new_tokens)[0]).int().cumprod(1)
    return {
        "texts": len(tokens),
        "identical_texts": int(together[:, -1].sum()),
        "tokens_until_they_part": float(together.sum(1).float().mean()),
        "of_tokens": new_tokens,
    }
