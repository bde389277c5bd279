"""Models without weights: what a config describes, with every tensor on the meta device; and how weights come in.

The weights are then read one block at a time (checkpoint.py), or in a form of our own (inference.py, export.py).
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from wandapp.errors import WandappError, shorten
from wandapp.quiet import LOAD_ERRORS, quiet_transformers, why_not_loaded
from wandapp.weight_files import read_json

MAX_BUFFER_BYTES = 64 << 20  # of what a model computes from its config; rotary frequencies take a few kilobytes
MAX_COUNT = 100_000  # layers, heads, experts or labels that a config may ask for
_AT_LEAST_ONE = ("max_position_embeddings", "sliding_window")  # in a config; of other sizes the weights' shapes tell


def skeleton(folder: str | Path, *, dtype: torch.dtype | None = None, max_blocks: int | None = None) -> nn.Module:
    """The model that the folder's config.json describes, in eval mode, with every tensor on the meta device.

    dtype       of its parameters; None: the config's own
    max_blocks  a config that asks for more decoder blocks is refused, since each costs memory even without weights
    """
    try:
        _refuse_absurd_numbers(Path(folder) / "config.json")
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        blocks = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
        if blocks < 1 and hasattr(config.get_text_config(), "num_hidden_layers"):
            raise WandappError(f"{folder}: config.json asks for {blocks} blocks, a model has at least 1; check it")
        if max_blocks is not None and blocks > max_blocks:
            raise WandappError(f"{folder}: config.json asks for {blocks} blocks, the weights hold at most {max_blocks}")
        return skeleton_of(config, dtype or config.dtype or torch.float32)
    except WandappError:
        raise
    except LOAD_ERRORS as error:
        raise WandappError(why_not_loaded(str(folder), error)) from error


def _refuse_absurd_numbers(path: Path) -> None:
    """transformers makes a module per layer or expert, and two dictionary entries per label, before any weight is read.

    Of other numbers it computes with whatever they are.
    """
    config = read_json(path, "the model's configuration")
    fields = list(config.items())
    fields += [pair for value in config.values() if isinstance(value, dict) for pair in value.items()]
    for name, value in fields:
        if re.search("layer|label|expert|block|head", name) and isinstance(value, int) and value > MAX_COUNT:
            raise WandappError(f"{path}: {name} is {value}, and no model has more than {MAX_COUNT}; check the file")
        if name in _AT_LEAST_ONE and isinstance(value, int) and value < 1:
            raise WandappError(f"{path}: {name} is {value}, which must be at least 1; check the file")
        if isinstance(value, float) and not math.isfinite(value):
            raise WandappError(f"{path}: {name} is {value}, which must be finite; check the file")


def skeleton_of(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a transformers config, in eval mode, with every tensor on the meta device."""
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def call_experts_singly(model: nn.Module) -> None:
    """Has transformers run experts one by one: its other ways multiply their 3-D parameter as a whole."""
    try:
        model.set_experts_implementation("eager")
    except (ValueError, RuntimeError) as error:
        reason = shorten(" ".join(str(error).split()))
        raise WandappError(
            f"{type(model).__name__}: its experts cannot run one by one ({reason}); check config.json"
        ) from None


def fill_skeleton(model: nn.Module, folder: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Gives a skeleton its weights, by name inside the model, and what no checkpoint stores: buffers and ties.

    tensors  are copied, in the type that the skeleton has in their place
    raises   WandappError when a weight is missing, does not belong to the model or has another shape
    """
    own = model.state_dict(keep_vars=True)
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in own:
            raise WandappError(
                f"{folder}: the tensor {name} does not belong to {type(model).__name__}; check config.json"
            )
        if tensor.shape != own[name].shape:
            raise WandappError(
                f"{folder}: {name} has shape {list(tensor.shape)}, config.json asks for {list(own[name].shape)}"
            )
        copies[name] = tensor.to(own[name].dtype, copy=True)
    model.load_state_dict(copies, strict=False, assign=True)
    model.tie_weights()
    if missing := sorted(name for name, value in model.state_dict().items() if value.is_meta):
        raise WandappError(f"{folder}: {len(missing)} weights of the model are missing, the first is {missing[0]}")
    compute_buffers(model, folder)
    if (Path(folder) / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except LOAD_ERRORS as error:
            raise WandappError(why_not_loaded(str(folder), error)) from error


@torch.no_grad()
def compute_buffers(model: nn.Module, folder: str | Path) -> None:
    """Rotary frequencies and the like, which the model computes from its config."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers' sign that a parameter is not to be drawn at random
    for module in model.modules():
        absent = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in absent:
            buffer = getattr(module, name)
            if buffer.nbytes > MAX_BUFFER_BYTES:
                raise WandappError(f"{folder}: config.json asks for a {type(module).__name__} of {buffer.nbytes} bytes")
            setattr(
                module, name, torch.full_like(buffer, float("nan") if buffer.is_floating_point() else 0, device="cpu")
            )
        if absent:
            model._init_weights(module)
