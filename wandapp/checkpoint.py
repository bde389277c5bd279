"""A checkpoint read and written part by part: transformers' own weight conversions, applied to a few tensors at a time.

A model's parameters are not always its checkpoint's tensors: experts are merged, names change, types are cast. Here the
functions behind `from_pretrained` and `save_pretrained` do that for one decoder block, so what is read and written is what
they would read and write.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from wandapp.blocks import find_blocks
from wandapp.conversion import checkpoint_state, names_inside
from wandapp.errors import WandappError
from wandapp.models import LoadedModel, load_skeleton, require_finite
from wandapp.quiet import quiet_transformers
from wandapp.shards import ShardReader
from wandapp.skeleton import compute_buffers
from wandapp.weight_files import checkpoint_files

OUTER = -1  # index of the part that is no block: embeddings, final norm, output head


class Checkpoint:
    """A folder of safetensors and the model it describes, whose tensors are on the meta device until they are placed.

    model   every parameter on "meta"; buffers that are computed from the config are there
    parts   names of the checkpoint's tensors by block index; OUTER for the rest
    """

    def __init__(self, reference: str | Path, *, dtype: str = "auto"):
        loaded, folder = load_skeleton(reference, dtype=dtype)
        self.model, self.tokenizer, self.source = loaded.model, loaded.tokenizer, loaded.source
        self.files = checkpoint_files(folder)
        self.shards = ShardReader(self.files)
        self.prefix, blocks = find_blocks(self.model)
        self.parts: dict[int, list[str]] = {index: [] for index in (OUTER, *range(len(blocks)))}
        for name, inside in names_inside(self.model, self.shards.tensors).items():
            self.parts[_block_of(inside, self.prefix)].append(name)
        compute_buffers(self.model, folder)

    def as_loaded(self) -> LoadedModel:
        """The skeleton and the tokenizer."""
        return LoadedModel(self.model, self.tokenizer, self.source)

    def read(self, part: int) -> dict[str, Tensor]:
        """The part's tensors as the files hold them; WandappError names the first that is NaN or Inf."""
        tensors = {name: self.shards.read(name) for name in self.parts[part]}
        require_finite(self.source, tensors)
        return tensors

    def nbytes(self, part: int) -> int:
        """Bytes of the part in the model's types."""
        size = self.model.dtype.itemsize
        stored = (self.shards.tensors[name] for name in self.parts[part])
        return sum(
            t.nbytes // t.dtype.itemsize * (size if t.dtype.is_floating_point else t.dtype.itemsize) for t in stored
        )


def place(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Gives `model` parameters made from a checkpoint's tensors, as `from_pretrained` makes them. `tensors` is emptied.

    where   names the tensors' origin in errors
    raises  WandappError on a tensor that the model does not know, or of another shape
    """
    used = getattr(model, "_weight_conversions", None)
    config = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        device_map={"": next(iter(tensors.values())).device} if tensors else None,
        weight_mapping=get_model_conversion_mapping(model),
    )
    with quiet_transformers():
        loading, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    tensors.clear()
    model._weight_conversions = used  # those of the whole checkpoint, not of this part
    for problem, names in (
        ("is not of the shape that config.json asks for", [name for name, *_ in loading.mismatched_keys]),
        ("could not be converted", list(loading.conversion_errors)),
    ):
        if names:
            raise WandappError(f"{where}: {sorted(names)[0]} {problem}; fetch the checkpoint again")


def block_tensors(model: nn.Module, prefix: str, index: int) -> dict[str, Tensor]:
    """The checkpoint's form of one block that is in memory, as `save_pretrained` would write it."""
    block = model.get_submodule(f"{prefix}.{index}")
    return _stored(model, {f"{prefix}.{index}.{name}": value for name, value in block.state_dict().items()})


def outer_tensors(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The checkpoint's form of everything outside the blocks; tied weights once."""
    state = {name: value for name, value in model.state_dict().items() if _block_of(name, prefix) == OUTER}
    return _stored(model, remove_tied_weights_from_state_dict(state, model))


def _stored(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    ignored = model._keys_to_ignore_on_save or ()
    return checkpoint_state(model, {name: value for name, value in state.items() if name not in ignored})


def _block_of(name: str, prefix: str) -> int:
    """Index of the block that a parameter lies in, or OUTER."""
    if not name.startswith(prefix + "."):
        return OUTER
    index = name.removeprefix(prefix + ".").split(".")[0]
    return int(index) if index.isdigit() else OUTER


@torch.no_grad()
def forget(module: nn.Module) -> None:
    """Puts every parameter of `module` back on the meta device, which frees its memory."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
