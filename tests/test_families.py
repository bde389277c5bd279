"""What is pruned in every family, and along which axis: written down by hand from each family's modelling code."""

import copy
import functools
import re

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from wandapp.pipeline import prune
from wandapp.verify import verify_model

ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
LLAMA_LIKE = ("model.layers", f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj")
EXPERTS = ("model.layers", f"{ATTENTION} mlp.gate mlp.experts.gate_up_proj mlp.experts.down_proj")
FUSED = "query_key_value {0}.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"

# family -> (list of blocks, linear maps of a block)
LAYOUTS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"], LLAMA_LIKE),
    "phi3": ("model.layers", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "opt": (
        "model.decoder.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    ),
    "gpt_neox": ("gpt_neox.layers", "attention." + FUSED.format("attention")),
    "bloom": ("transformer.h", "self_attention." + FUSED.format("self_attention")),
    "falcon": ("transformer.h", "self_attention." + FUSED.format("self_attention")),
    "starcoder2": ("model.layers", f"{ATTENTION} mlp.c_fc mlp.c_proj"),
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
}
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0))


def input_axis(family: str, param: Tensor) -> int:
    """GPT-2's Conv1D stores [in, out]; linear layers [out, in], experts [experts, out, in]."""
    return 0 if family == "gpt2" else param.ndim - 1


def along_inputs(param: Tensor, axis: int, m: int) -> Tensor:
    """[groups, m]: every m consecutive inputs of every output."""
    return param.detach().movedim(axis, -1).reshape(-1, m)


def prunable(family: str, model: nn.Module) -> set[str]:
    """Names of the parameters that have to be pruned."""
    blocks, layers = LAYOUTS[family]
    parameters = dict(model.named_parameters())
    names = {f"{blocks}.{i}.{layer}" for i in range(len(model.get_submodule(blocks))) for layer in layers.split()}
    return {name if name in parameters else f"{name}.weight" for name in names}


pruned_copy = functools.partial(tiny.pruned_copy, tokens=TOKENS)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_every_linear_map_of_the_blocks_and_nothing_else(tiny_model, tiny_family, pattern):
    dense = tiny_model(tiny_family)[0]
    tested, _ = pruned_copy(dense, method="wanda", sparsity=pattern)
    n, m = map(int, pattern.split(":"))
    expected, seen = prunable(tiny_family, dense), set()
    for (name, before), after in zip(dense.named_parameters(), tested.parameters(), strict=True):
        if name in expected:
            seen.add(name)
            kept = along_inputs(after, input_axis(tiny_family, after), m) != 0
            assert (kept.sum(dim=-1) == n).all(), name
            assert torch.equal(after, before * (after != 0)), name
        else:
            assert torch.equal(after, before), f"{name} must not change"
    assert seen == expected
    assert tested(TOKENS).logits.isfinite().all()
    assert verify_model(tested, pattern).ok


def test_zeros_are_positive(tiny_model, tiny_family):
    tested, _ = pruned_copy(tiny_model(tiny_family)[0], method="wanda", sparsity="2:4")
    for name, param in tested.named_parameters():
        assert not torch.signbit(param[param == 0]).any(), name


def test_verifier_sees_one_weight_too_many(tiny_model, tiny_family):
    tested, _ = pruned_copy(tiny_model(tiny_family)[0], method="wanda", sparsity="2:4")
    name = sorted(prunable(tiny_family, tested))[-1]
    param = dict(tested.named_parameters())[name]
    with torch.no_grad():
        group = param[-1] if param.ndim == 3 else param
        group = group.movedim(0 if tiny_family == "gpt2" else 1, 1)[5, 8:12]  # third group of the sixth output
        group[group == 0] = torch.tensor([1.0, 0.0])
    result = verify_model(tested, "2:4")
    assert not result.ok
    assert name.removesuffix(".weight") in str(result.first_offence)


def test_tied_embeddings_stay_tied_and_dense(tiny_model):
    dense = tiny_model("llama", tie_word_embeddings=True)[0]
    tested, _ = pruned_copy(dense, method="wanda", sparsity="2:4")
    assert tested.lm_head.weight is tested.model.embed_tokens.weight
    assert torch.equal(tested.lm_head.weight, dense.lm_head.weight)


def test_skipped_layers_do_not_change(tiny_model):
    dense = tiny_model("llama")[0]
    tested, _ = pruned_copy(dense, method="wanda", sparsity="2:4", skip=("down_proj",))
    for (name, before), after in zip(dense.named_parameters(), tested.parameters(), strict=True):
        changes = name.endswith("proj.weight") and "down_proj" not in name
        assert torch.equal(before, after) != changes, name
    assert verify_model(tested, "2:4", skip=("down_proj",)).ok
    assert "model.layers.0.mlp.down_proj" in str(verify_model(tested, "2:4").first_offence)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm", "wanda++"])
def test_indivisible_inputs_are_refused_before_anything_changes(tiny_model, method):
    model = tiny_model("llama", intermediate_size=130)[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj.*130"):
        prune(model, calibration=TOKENS, method=method, sparsity="2:4")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_indivisible_inputs_can_be_skipped(tiny_model):
    model = tiny_model("llama", intermediate_size=130)[0]
    prune(model, calibration=TOKENS, method="wanda", sparsity="2:4", skip=("down_proj",))
    assert verify_model(model, "2:4", skip=("down_proj",)).ok


SMALL = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENDING = SMALL | dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, head_dim=16)


def unlisted(model_type: str, **fields) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **fields)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim >= 2:
                param.normal_(std=0.1)
    return model


UNLISTED = {
    "mamba": SMALL | dict(state_size=8, intermediate_size=128),
    "rwkv": SMALL | dict(attention_hidden_size=64, intermediate_size=128),
    "t5": dict(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    # their experts are stored [experts, in, out], the other way round than Mixtral's under the same names
    "gpt_oss": ATTENDING | dict(num_local_experts=4, num_experts_per_tok=2),
    "llama4_text": ATTENDING | dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=128),
    "openai-gpt": dict(vocab_size=300, n_embd=64, n_layer=2, n_head=4),  # Conv1D; its blocks return lists
    # its blocks also take embeddings of the token ids, which change with the text
    "gemma4_text": ATTENDING | dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=300),
    "granitemoe": ATTENDING | dict(num_local_experts=4, num_experts_per_tok=2),
    "olmo2": ATTENDING,
}


@pytest.mark.parametrize("model_type", list(UNLISTED))
def test_an_unlisted_family_is_pruned_rightly_or_refused_by_class_name(model_type):
    dense = unlisted(model_type, **UNLISTED[model_type])
    tested = copy.deepcopy(dense)
    try:
        prune(tested, calibration=TOKENS, method="wanda", sparsity="2:4")
    except ValueError as refusal:
        classes = {type(module).__name__ for module in dense.modules()} - {"Linear", "ModuleList"}
        assert any(re.search(rf"\b{name}\b", str(refusal)) for name in classes), refusal
        for before, after in zip(dense.parameters(), tested.parameters(), strict=True):
            assert torch.equal(before, after)
        return
    for name, module in tested.named_modules():
        is_in_block, is_conv1d = re.search(r"\.\d+\.", name), type(module).__name__ == "Conv1D"
        if is_in_block and (isinstance(module, nn.Linear) or is_conv1d):
            assert ((along_inputs(module.weight, 0 if is_conv1d else 1, 4) != 0).sum(dim=-1) <= 2).all(), name
    for name, param in tested.named_parameters():
        if param.ndim == 3 and ".experts." in name:
            axis = 1 if model_type in ("gpt_oss", "llama4_text") else 2
            assert ((along_inputs(param, axis, 4) != 0).sum(dim=-1) <= 2).all(), name


@pytest.mark.parametrize("sparsity", ["2:4", "0.6"])
def test_preset_best_of_every_family(tiny_model, tiny_family, sparsity):
    """Own text, permutation or allocation, regional optimisation and reconstruction, one after the other."""
    options = dict(self_samples=6, ro_rounds=1, ro_samples=4, reconstruct_passes=1, batch_size=2)
    model, report = pruned_copy(tiny_model(tiny_family)[0], preset="best", sparsity=sparsity, **options)
    assert (report.method, report.samples, report.self_samples) == ("wanda+ro+reconstruct", 10, 6)
    assert verify_model(model, "2:4").ok == (sparsity == "2:4")  # of allocated zeros a block has its own share
    assert report.sparsity == pytest.approx(0.5 if sparsity == "2:4" else 0.6, abs=1e-5)
    assert sum(block.error for block in report.blocks) < sum(block.error_before for block in report.blocks)
    expected = ("not permuted", "no calibration token", "the weights before it were kept")
    assert not [warning for warning in report.warnings if not any(part in warning for part in expected)]
