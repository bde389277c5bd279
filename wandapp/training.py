"""A short training loop whose state is durable: a run that is killed continues bit for bit where it was last saved."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wandapp.errors import WandappError
from wandapp.recover_config import RecoverConfig

STATE_FILE, LOSS_FILE = "state.safetensors", "loss.jsonl"


class Step(NamedTuple):
    """One optimiser step. seconds: of this step; loss: mean over its tokens, before the step."""

    step: int
    loss: float
    lr: float
    gradient_norm: float
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Where a run keeps its state: `folder`; `identity` names what it belongs to (hashes, options), and must agree."""

    folder: Path
    identity: dict[str, str]

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Whole or not at all, on the disk before this returns."""
        path, partial = self.folder / STATE_FILE, self.folder / f"{STATE_FILE}.partial"
        try:
            save_file(tensors, partial, metadata={"step": str(step), "identity": json.dumps(self.identity)})
            descriptor = os.open(partial, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise WandappError(
                f"{path}: the training state cannot be written ({error}); make room, then --resume"
            ) from None

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """(steps done, tensors); (0, {}) where nothing was saved yet.

        raises  WandappError where the state is damaged or belongs to another run, naming what differs
        """
        path = self.folder / STATE_FILE
        if not path.is_file():
            return 0, {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            step, identity = int(metadata["step"]), json.loads(metadata["identity"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise WandappError(f"{path}: not a readable training state ({error}); remove it to start again") from None
        for name in self.identity.keys() | identity.keys():
            if self.identity.get(name) != identity.get(name):
                raise WandappError(
                    f"{path}: {name} was {identity.get(name)} when it was saved and is {self.identity.get(name)} now; give "
                    "the same, or remove that folder to start again"
                )
        return step, tensors


def train(
    model: nn.Module,
    tokens: Tensor,
    config: RecoverConfig,
    state: TrainingState,
    on_step: Callable[[Step, int], None] | None = None,
) -> list[Step]:
    """Trains in place what requires a gradient, on tokens [samples, seq_len], each sample once; returns this call's steps.

    Continues from `state` where it holds one. Every step's figures are also appended to LOSS_FILE beside it.
    on_step  called with (step, steps in all)
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=config.weight_decay)
    per_step = config.batch_size * config.accumulate
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))
    steps = math.ceil(len(tokens) / per_step)
    done, saved = state.load()
    if saved:
        _restore(saved, trained, optimizer)
    losses = _kept_lines(state.folder / LOSS_FILE, done)
    model.train()
    taken = []
    with losses:
        for index in range(done, steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate_factor(index, steps, config)
            step = _take_step(model, tokens[order[index * per_step : (index + 1) * per_step]], optimizer, config, index)
            taken.append(step)
            losses.write(json.dumps(step._asdict()) + "\n")
            losses.flush()
            if (index + 1) % config.save_every == 0 and index + 1 < steps:
                state.save(index + 1, _collect(trained, optimizer))
            if on_step:
                on_step(step, steps)
    model.eval()
    return taken


def learning_rate_factor(step: int, steps: int, config: RecoverConfig) -> float:
    """Share of the highest learning rate at `step` (from 0): rises over the warm-up, then falls to 0 by the schedule."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / (steps - warmup)  # 1 at the first step after the warm-up, above 0 at the last
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[config.schedule]


def _take_step(
    model: nn.Module, samples: Tensor, optimizer: torch.optim.Optimizer, config: RecoverConfig, index: int
) -> Step:
    """One optimiser step on samples [batch_size x accumulate, seq_len]."""
    started = time.perf_counter()
    device = model.get_input_embeddings().weight.device
    total = 0.0
    for batch in samples.split(config.batch_size):
        batch, share = batch.to(device), len(batch) / len(samples)
        with torch.autocast(device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext():
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        (loss * share).backward()
        total += loss.item() * share
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
    if not math.isfinite(total) or not math.isfinite(norm):
        raise WandappError(
            f"step {index + 1}: the loss is {total} and the gradient's norm {norm}; lower --lr, or use --dtype float32"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    lr = optimizer.param_groups[0]["lr"]
    return Step(index + 1, total, lr, norm, samples.numel(), time.perf_counter() - started)


@contextmanager
def recomputed_blocks(blocks: nn.ModuleList) -> Iterator[None]:
    """Gradient checkpointing: each block keeps its inputs only, and runs again, dropout included, in the backward."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _collect(trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next steps depend on, as tensors by name."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in trained.items():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in optimizer.state[parameter].items()}
    return tensors


def _restore(saved: dict[str, Tensor], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.set_rng_state(saved["rng.cpu"])
    if "rng.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["rng.cuda"])
    for name, parameter in trained.items():
        parameter.data.copy_(saved[f"weight.{name}"])
        keys = ("exp_avg", "exp_avg_sq")
        moments = {key: saved[f"{key}.{name}"].to(parameter.device) for key in keys}
        optimizer.state[parameter] = {"step": saved[f"step.{name}"], **moments}


def _kept_lines(path: Path, steps: int) -> TextIO:
    """The loss file, open to append, without lines of steps after the saved state, which will be taken again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if path.is_file() else []
    path.write_text("".join(lines), encoding="utf-8")
    return path.open("a", encoding="utf-8")
