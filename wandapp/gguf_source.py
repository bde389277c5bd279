"""A .gguf file as a folder of safetensors, made once, a block at a time: quantised weights cannot be streamed as they are.

Imports transformers for its table of GGUF's tensor names and layouts.
"""

import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from wandapp.errors import WandappError
from wandapp.manifest import fingerprint
from wandapp.models import require_gguf_blocks, save_companions
from wandapp.quiet import LOAD_ERRORS, quiet_transformers, why_not_loaded
from wandapp.shards import write_index, write_shard
from wandapp.tokenizer import load_tokenizer

_COMPLETE = "complete.json"


def convert_gguf(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes `path`, de-quantised to `dtype`, as an ordinary checkpoint into `folder`, unless it is there already.

    One block's tensors are in memory at a time. The marker of completeness is written last.
    """
    mark = {"source": fingerprint(path).model_dump(), "dtype": str(dtype)}
    marker = folder / _COMPLETE
    if marker.is_file() and json.loads(marker.read_bytes()) == mark:
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = gguf_skeleton(path, dtype)
    written: list[Path] = []
    for tensors in _parts(path, model, dtype):
        written.append(folder / f"gguf-{len(written):05}.safetensors")
        write_shard(written[-1], tensors, {"format": "pt"})
    write_index(folder, written)
    save_companions(model, load_tokenizer(path), folder)
    marker.write_text(json.dumps(mark), encoding="utf-8")


def gguf_skeleton(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model that the file describes, every tensor on the meta device."""
    require_gguf_blocks(path)
    with _read_from(path), quiet_transformers():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


@contextmanager
def _read_from(path: Path) -> Iterator[None]:
    """Turns what a damaged file makes its readers raise into one sentence."""
    try:
        yield
    except LOAD_ERRORS as error:
        raise WandappError(why_not_loaded(str(path), error)) from error


def _parts(path: Path, model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Tensors under transformers' names: those outside the blocks, then each block's."""
    with _read_from(path):
        reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    fields = model.config.to_dict()
    processor: TensorProcessor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=fields)
    names = get_gguf_hf_weights_map(model, processor)
    groups: dict[str, list[Any]] = {}
    for tensor in reader.tensors:  # named blk.3.attn_q.weight inside blocks
        block = ".".join(tensor.name.split(".")[:2]) if tensor.name.startswith("blk.") else ""
        groups.setdefault(block, []).append(tensor)
    for group in groups.values():
        merged: dict[str, Any] = {"tensors": {}, "config": fields}  # processors put merged experts in here
        for tensor in group:
            try:
                weights = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise WandappError(
                    f"{path}: {tensor.name} is quantised in a way that the gguf package cannot undo"
                ) from None
            done = processor.process(
                weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=merged
            )
            if done.name in names:
                merged["tensors"][names[done.name]] = torch.from_numpy(done.weights.copy()).to(dtype)
        reader.data._mmap.madvise(mmap.MADV_DONTNEED)  # what was read need not stay mapped
        yield merged["tensors"]
