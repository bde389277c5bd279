"""Tiny random models of every supported family, and a byte-level tokenizer: built here, no network, no files.

A test gets them as the fixtures `tiny_model`, `tiny_tokenizer` and `tiny_family` (conftest.py).
"""

import copy
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from wandapp.blocks import find_blocks, find_linears
from wandapp.kernels.select import select_nm, select_rows
from wandapp.pattern import SparsityPattern
from wandapp.pipeline import prune
from wandapp.report import PruneReport

HIDDEN, FFN, BLOCKS, VOCAB = 64, 128, 3, 300

_COMMON = dict(vocab_size=VOCAB, bos_token_id=256, eos_token_id=257, pad_token_id=257)
_LLAMA_LIKE = dict(
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
_ALTERNATING = dict(
    head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
)
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=FFN)

# family -> (model_type of transformers, fields of its config)
FAMILIES = {
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", _LLAMA_LIKE | dict(head_dim=16, sliding_window=16)),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE | dict(head_dim=16)),
    "gemma2": ("gemma2", _LLAMA_LIKE | _ALTERNATING | dict(query_pre_attn_scalar=16)),
    "gemma3": ("gemma3_text", _LLAMA_LIKE | _ALTERNATING | dict(query_pre_attn_scalar=16)),
    "phi3": ("phi3", _LLAMA_LIKE),
    "gpt2": ("gpt2", dict(n_embd=HIDDEN, n_inner=FFN, n_layer=BLOCKS, n_head=4, n_positions=512)),
    "opt": (
        "opt",
        dict(
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=FFN,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=512,
        ),
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "bloom": ("bloom", dict(hidden_size=HIDDEN, n_layer=BLOCKS, n_head=4)),
    "falcon": (
        "falcon",
        dict(hidden_size=HIDDEN, ffn_hidden_size=FFN, num_hidden_layers=BLOCKS, num_attention_heads=4),
    ),
    "starcoder2": ("starcoder2", _LLAMA_LIKE | dict(sliding_window=16)),
    "mixtral": ("mixtral", _LLAMA_LIKE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("qwen3_moe", _LLAMA_LIKE | _EXPERTS | dict(head_dim=16, num_experts=4, decoder_sparse_step=1)),
}


def tiny_model(family: str, seed: int = 0, **overrides) -> tuple[torch.nn.Module, object]:
    """(model, config) of `family` (a key of FAMILIES): 3 blocks, hidden 64, vocabulary 300, fp32, eval mode.

    Every matrix has standard deviation 1/sqrt(hidden), so activations are of order 1; norms and biases are perturbed so
    that none of them is a no-op. `overrides` are fields of the config, e.g. vocab_size=258.
    """
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(_COMMON | fields | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():  # a tied matrix comes once
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2:
                param.copy_(noise / HIDDEN**0.5)
            else:
                param.add_(noise, alpha=0.1)
    return model, config


def pruned_copy(model: torch.nn.Module, tokens: torch.Tensor, **options) -> tuple[torch.nn.Module, PruneReport]:
    """(pruned copy of the model, report), calibrated on token ids [samples, seq_len]."""
    model = copy.deepcopy(model)
    return model, prune(model, calibration=tokens, **options)


def prune_by_magnitude(model: torch.nn.Module, sparsity: str) -> None:
    """Every linear map of the decoder blocks to the pattern, in place: the quickest pruned model."""
    pattern = SparsityPattern.parse(sparsity)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for view in find_linears(block, f"{prefix}.{index}").values():
            weight = view.weight.contiguous()
            keep = pattern.keep(weight.shape[1])
            nm = {"n": pattern.n, "m": pattern.m} if pattern.is_structured else {}
            mask = select_nm(weight, **nm) if nm else select_rows(weight, keep=keep)
            view.weight.copy_(torch.where(mask, weight, 0.0))


def tiny_tokenizer(*, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Tokenizer with one token per UTF-8 byte (256), then <s> (256) and </s> (257); no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", name_or_path="tiny-byte-level"
    )


def write_gguf(path: Path, model: torch.nn.Module) -> None:
    """A tiny Llama whose linear maps are in blocks of 8 bits."""
    writer, alphabet = gguf.GGUFWriter(str(path), "llama"), pre_tokenizers.ByteLevel.alphabet()
    for add, value in (
        (writer.add_name, "tiny"),
        (writer.add_context_length, 512),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 3),
        (writer.add_feed_forward_length, 128),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_dimension_count, 16),
        (writer.add_vocab_size, 300),
        (writer.add_tokenizer_model, "gpt2"),
        (
            writer.add_token_list,
            [*sorted(alphabet), "<s>", "</s>", "th", *(f"<{i}>" for i in range(41))],
        ),
        (writer.add_token_merges, ["t h"]),
        (writer.add_token_types, [1] * 300),
        (writer.add_bos_token_id, 256),
        (writer.add_eos_token_id, 257),
    ):
        add(value)
    names, kind = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3), gguf.GGMLQuantizationType.Q8_0
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        packed = {"tensor": gguf.quantize(value.numpy(), kind), "raw_dtype": kind} if "_proj" in name else {}
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", **({"tensor": value.numpy()} | packed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
