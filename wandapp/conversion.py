"""How the tensors of a checkpoint become a model's parameters: transformers renames them and merges those of experts.

Mixtral's checkpoint has a matrix per expert and projection, its model one 3-D parameter for the two projections of all
experts:

    ...block_sparse_moe.experts.5.w1.weight   [ffn, hidden]  -> rows   0 .. ffn - 1      of ...mlp.experts.gate_up_proj[5]
    ...block_sparse_moe.experts.5.w3.weight   [ffn, hidden]  -> rows ffn .. 2 ffn - 1
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    rename_source_key,
    revert_weight_conversion,
)

from wandapp.errors import WandappError


class Home(NamedTuple):
    """Where a model keeps a checkpoint's tensor: as parameter `name`, or as rows of one expert of the 3-D `name`.

    expert  index along the first axis; None: the tensor is the whole parameter
    part    which of the `parts` equal shares of the expert's rows
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def tensor_homes(model: nn.Module, tensor_names: Iterable[str]) -> dict[str, Home]:
    """The home of each checkpoint tensor in `model`.

    raises  WandappError on a tensor that the model splits, transposes or merges otherwise than experts are merged
    """
    found: dict[str, Home] = {}
    for tensor, (name, source, converters) in _renamed(model, tensor_names).items():
        found[tensor] = Home(name) if source is None else _expert_home(model, tensor, name, source, converters)
    return found


def whole_parameters(model: nn.Module, tensor_names: Iterable[str]) -> dict[str, str]:
    """Name in `model` of each checkpoint tensor that is a parameter as it stands; those that are converted are left out."""
    renamed = _renamed(model, tensor_names)
    return {tensor: name for tensor, (name, source, _) in renamed.items() if source is None}


def names_inside(model: nn.Module, tensor_names: Iterable[str]) -> dict[str, str]:
    """Name in `model` of each checkpoint tensor; where it is merged or split, of the first parameter it becomes part of."""
    return {tensor: name for tensor, (name, _, _) in _renamed(model, tensor_names).items()}


def _renamed(model: nn.Module, tensor_names: Iterable[str]) -> dict[str, tuple[str, str | None, list[WeightConverter]]]:
    """Of each tensor: its name in `model`, the converter's pattern that applies (None: none), and all converters."""
    mapping = get_model_conversion_mapping(model)
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in mapping if not isinstance(transform, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    return {
        tensor: (*rename_source_key(tensor, renamings, converters, prefix, own), converters) for tensor in tensor_names
    }


def checkpoint_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, a state dict of `model`, by the names and in the pieces that a checkpoint of that model has."""
    return revert_weight_conversion(model, state)


def _expert_home(model: nn.Module, tensor: str, name: str, source: str, converters: list[WeightConverter]) -> Home:
    converter = next(one for one in converters if source in one.source_patterns)
    merge, *rest = converter.operations
    stacks = isinstance(merge, MergeModulelist) and merge.dim == 0 and len(converter.target_patterns) == 1
    joins_rows = not rest or len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1
    numbers = re.findall(r"\.(\d+)\.", tensor)
    if not (stacks and joins_rows and numbers):
        steps = ", ".join(type(step).__name__ for step in converter.operations)
        raise WandappError(
            f"{tensor}: {type(model).__name__} converts it by {steps}, which packing does not know; keep this checkpoint dense"
        )
    parts = converter.source_patterns
    return Home(name, int(numbers[-1]), parts.index(source), len(parts))
