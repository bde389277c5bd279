"""llama.cpp beside our own figures: the same weights at the same precision, written as GGUF, and the same prompts.

Needs the package llama-cpp-python. The GGUF file has no vocabulary, since prompts go in and come out as token ids.
"""

import time
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from wandapp.errors import WandappError

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> GGUF's name
_FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
_CACHE_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


class LlamaCpp:
    """A dense model in llama.cpp, called as `bench_inference` calls its own; one sequence at a time."""

    max_batch = 1

    def __init__(self, model: nn.Module, folder: Path, context: int):
        llama_cpp = require_llama_cpp()
        path = folder / "model.gguf"
        write_gguf(model, path)
        start = time.perf_counter()
        cache = _CACHE_TYPES[model.dtype].value  # its default, float16, would be another precision than ours
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(), n_gpu_layers=0, type_k=cache, type_v=cache, verbose=False,
        )  # fmt: skip
        self.load_seconds = time.perf_counter() - start
        self.version = llama_cpp.__version__

    def prefill(self, tokens: Tensor) -> None:
        self.llama.reset()
        self.llama.eval(tokens[0].tolist())

    def generate(self, tokens: Tensor, new_tokens: int) -> tuple[Tensor, list[float]]:
        """Greedy continuation [1, new_tokens], and the milliseconds of each step but the first."""
        written, ends = [], []
        for token in self.llama.generate(tokens[0].tolist(), top_k=1, temp=0.0, repeat_penalty=1.0):
            written.append(token)
            ends.append(time.perf_counter())
            if len(written) == new_tokens:
                break
        steps = [(later - earlier) * 1e3 for earlier, later in zip(ends, ends[1:], strict=False)]
        return torch.tensor([written]), steps


def require_llama_cpp() -> Any:
    """The package, or one sentence."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # it raises the last two where its library does not load
        reason = "is not installed" if isinstance(error, ImportError) else f"does not load ({error})"
        raise WandappError(
            f"--compare llama.cpp: the package llama-cpp-python {reason}; run: pip install llama-cpp-python"
        ) from None
    return llama_cpp


def write_gguf(model: nn.Module, path: Path) -> None:
    """The weights of a dense model of the Llama or Qwen families, in its own type; norms in float32 as llama.cpp wants them.

    raises  WandappError on another family, on scaled rotary embeddings and on sliding windows
    """
    config = model.config
    name = _ARCHITECTURES.get(config.model_type)
    rope = config.rope_parameters if name else {}
    if name is None or rope.get("rope_type", "default") != "default" or getattr(config, "sliding_window", None):
        raise WandappError(
            f"--compare llama.cpp: only {', '.join(_ARCHITECTURES)} without scaled rotary embeddings or sliding windows are "
            f"written as GGUF here, got {config.model_type}; leave --compare out"
        )
    writer = gguf.GGUFWriter(path, name)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_file_type(_FILE_TYPES[model.dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    tied = getattr(model, "all_tied_weights_keys", {})
    for inside, tensor in model.state_dict().items():
        if inside in tied:
            continue
        if name == "llama" and inside.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, heads if "q_proj" in inside else kv_heads)
        _add(writer, names.get_name(inside, try_suffixes=(".weight", ".bias")), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head in llama.cpp's rotary order: it turns neighbours (0, 1), transformers turns (0, head_size / 2)."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
