"""Training that cannot move a zero: LoRA behind a mask (through peft), or masked gradients of the weights themselves.

    adapter    y = x (W + mask * (B A) * alpha / r)^T        mask: the non-zeros of W when the adapter was put on
    full       dL/dW <- mask * dL/dW                          AdamW leaves a weight at 0 whose gradient is always 0

Merging writes W + mask * (B A) * alpha / r, so the pattern of W is the pattern of the result.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from wandapp.blocks import LinearView, find_blocks, find_linears
from wandapp.errors import WandappError, compiled
from wandapp.recover_config import RecoverConfig

_ADAPTER = "default"
# q_proj and v_proj as in the papers; the projection that holds both where a family fuses them
_QUERY_VALUE = re.compile(r"\.(q_proj|v_proj|query|value|c_attn|query_key_value|W?qkv(_proj)?|in_proj_qkvz?)$")


class MaskedLora(LoraLinear):
    """peft's LoRA layer whose update is zero wherever the frozen weight is.

    base_layer  nn.Linear [out, in] or GPT-2's Conv1D [in, out]; its zeros are noted here
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any):
        super().__init__(base_layer, adapter_name, **options)
        self.transposed = not isinstance(base_layer, nn.Linear)
        self.register_buffer("mask", base_layer.weight.detach() != 0, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """mask * (B A) * alpha / r in fp32, shaped as the frozen weight is stored."""
        with torch.autocast(self.mask.device.type, enabled=False):
            update = self.lora_B[adapter].weight @ self.lora_A[adapter].weight  # [out, in]
        update = update.T if self.transposed else update
        return update * self.scaling[adapter] * self.mask

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        update, dropout = self.get_delta_weight(_ADAPTER), self.lora_dropout[_ADAPTER]
        if self.training and isinstance(dropout, nn.Dropout):
            return self._product(x, weight, bias) + self._product(dropout(x), update)
        return self._product(x, weight + update, bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.T if self.transposed else weight, bias)

    def merged_weight(self) -> Tensor:
        """W + update in fp32, as stored, +0.0 where the mask is not."""
        return torch.where(self.mask, self.base_layer.weight.float() + self.get_delta_weight(_ADAPTER), 0.0) + 0.0


def linear_views(model: nn.Module) -> Iterator[LinearView]:
    """Every linear map of the decoder blocks."""
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        yield from find_linears(block, f"{prefix}.{index}", skip=(".*",)).values()


def choose_targets(model: nn.Module, targets: str) -> list[str]:
    """Dotted names of the linear maps that get an adapter: "qv", "all", or those a regular expression finds.

    raises  WandappError where none is left; experts in 3-D parameters are no modules and cannot have one
    """
    names = [view.name for view in linear_views(model) if _takes_adapter(model, view)]
    if targets == "all":
        chosen = names
    elif targets == "qv":
        chosen = [name for name in names if _QUERY_VALUE.search(name)]
    else:
        chosen = [name for name in names if compiled(targets, "--targets").search(name)]
    if not chosen:
        raise WandappError(
            f"--targets {targets!r} matches no linear map of {type(model).__name__}; its last block has "
            f"{', '.join(names[-4:]) or 'none that takes an adapter'}; give all, or a regular expression"
        )
    return chosen


def _takes_adapter(model: nn.Module, view: LinearView) -> bool:
    module = None if view.is_expert else model.get_submodule(view.name)
    return isinstance(module, nn.Linear) or view.transposed and module is not None


def add_adapters(model: nn.Module, config: RecoverConfig) -> list[str]:
    """Puts a `MaskedLora` around every chosen linear map, freezes all else; returns their dotted names.

    A and B are fp32, whatever the frozen weights are. B starts at 0, A at random from torch's generator: the model computes
    the same until the first step.
    """
    names = choose_targets(model, config.targets)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        fan_in_fan_out=not isinstance(model.get_submodule(names[0]), nn.Linear),
    )
    kinds = {type(model.get_submodule(name)): MaskedLora for name in names}
    lora._register_custom_module(kinds)  # peft's way to bring a layer of one's own
    inject_adapter_in_model(lora, model, adapter_name=_ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return names


def merge_(model: nn.Module) -> int:
    """Writes W + mask * (B A) * alpha / r into every adapted weight and takes the adapters off; returns their number.

    raises  WandappError, before anything is written, where that would not keep the zeros: an adapter trained without
            the mask (plain LoRA), or a weight whose zeros are no longer those the adapter was trained behind
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        _refuse_lost_zeros(name, layer)
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        weight.data.copy_(layer.merged_weight())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base_layer)
    return len(layers)


def _refuse_lost_zeros(name: str, layer: nn.Module) -> None:
    present = layer.get_base_layer().weight != 0
    if not isinstance(layer, MaskedLora):
        zeros = present.numel() - int(present.sum())
        raise WandappError(
            f"{name}: this adapter was trained without the mask, and merging it would fill the weight's {zeros} zeros; "
            "train one with wandapp recover, which keeps them"
        )
    if not torch.equal(present, layer.mask):
        changed = int((present != layer.mask).sum())
        raise WandappError(
            f"{name}: {changed} weights have become zero or non-zero since the adapter was put on, so merging would not "
            "give the pattern it was trained with; start from the checkpoint that the training started from"
        )


def train_blocks(model: nn.Module) -> dict[str, Tensor]:
    """Makes every floating-point weight of the decoder blocks trainable in fp32, zeros of linear maps excepted.

    returns  the masks by parameter name, for `require_zeros` in the end
    """
    model.requires_grad_(False)
    linear = {id(view.parameter) for view in linear_views(model)}
    _, blocks = find_blocks(model)
    inside = {id(parameter) for parameter in blocks.parameters()}
    masks = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if id(parameter) in linear:
            masks[name] = parameter.detach() != 0
            parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask)
    return masks


def require_zeros(name: str, weight: Tensor, mask: Tensor) -> None:
    """Raises where a weight behind the mask is no longer zero; it would mean that the training was not what it says."""
    moved = int(((weight != 0) & ~mask).sum())
    if moved:
        raise RuntimeError(f"{name}: {moved} zeros moved in training; this is an error in wandapp, please report it")
