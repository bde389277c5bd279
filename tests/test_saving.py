"""A packed model in memory is saved in either form, bit for bit; experts are packed like every other linear map."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wandapp import WandappError, load_model, load_sparse, save_sparse, sparsify
from wandapp.modules import SparseExperts, SparseLinear
from wandapp.packed import PackedCheckpoint
from wandapp.packing import pack_checkpoint, unpack_checkpoint
from wandapp.verify import verify_model, verify_packed


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_bits(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
    )


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(12).view(2, 6)).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_saved_in_either_form_bit_for_bit(pruned_checkpoint, tmp_path, family, sparsity):
    _, folder = pruned_checkpoint(family, sparsity)
    pack_checkpoint(folder, tmp_path / "packed")
    model = load_sparse(tmp_path / "packed")
    save_sparse(model, tmp_path / "again")
    assert same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "packed"))
    assert PackedCheckpoint(tmp_path / "again").linears == PackedCheckpoint(tmp_path / "packed").linears
    save_sparse(model, tmp_path / "dense", packed=False)
    model.save_pretrained(tmp_path / "pretrained")
    for form in ("dense", "pretrained"):
        assert same_bits(tensors_of(tmp_path / form), tensors_of(folder))
    assert torch.equal(logits(load_model(tmp_path / "pretrained").model), logits(load_model(folder).model))


def test_what_lies_beside_the_weights_is_saved(pruned_checkpoint, tiny_tokenizer, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4")
    model = sparsify(load_model(folder, dtype="bfloat16").model, "2:4")
    save_sparse(model, tmp_path / "dense", packed=False, tokenizer=tiny_tokenizer())
    loaded = load_model(tmp_path / "dense")
    assert loaded.model.dtype == torch.bfloat16 and loaded.tokenizer is not None
    assert json.loads((tmp_path / "dense" / "wandapp" / "recipe.yaml").read_text()) == {"sparsity": "2:4", "skip": []}
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_linear_maps_that_were_left_dense_stay_dense(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4")
    dense = load_model(folder).model
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.fill_(1.0)
    save_sparse(sparsify(dense, "2:4", skip=(r"1\.mlp\.down",)), tmp_path / "packed")
    model = load_sparse(tmp_path / "packed")
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    save_sparse(model, tmp_path / "again")
    assert len(PackedCheckpoint(tmp_path / "again").linears) == 20
    assert verify_packed(tmp_path / "again", "2:4", skip=(r"^model\.layers\.1\.mlp\.down_proj$",)).ok


def test_saving_refuses_a_dense_model_and_a_folder_in_use(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4")
    with pytest.raises(WandappError, match="no model of load_sparse"):
        save_sparse(load_model(folder).model, tmp_path / "out")
    model = sparsify(load_model(folder).model, "2:4")
    (tmp_path / "out").mkdir()
    with pytest.raises(WandappError, match="exists already"):
        save_sparse(model, tmp_path / "out")


# Experts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_run_packed_from_both_storage_forms(pruned_checkpoint, tmp_path, family):
    """A checkpoint has a matrix per expert; the same model may also be saved with its 3-D parameters."""
    dense, folder = pruned_checkpoint(family, "2:4")
    merged = tmp_path / "merged"
    shutil.copytree(folder, merged, ignore=shutil.ignore_patterns("*.safetensors"))
    dense.save_pretrained(merged, save_original_format=False)
    assert any(tensor.dim() == 3 for tensor in tensors_of(merged).values())
    for form in (folder, merged):
        summary = pack_checkpoint(form, tmp_path / "packed", overwrite=True)
        assert summary.linear_packed_bytes == 17 / 32 * summary.linear_dense_bytes
        sparse = load_sparse(tmp_path / "packed")
        experts = sparse.model.layers[0].mlp.experts
        assert type(experts.gate_up_proj) is SparseExperts and type(experts.down_proj[3]) is SparseLinear
        assert (logits(sparse) - logits(dense)).abs().max() < 3e-5 * logits(dense).abs().max()
        unpack_checkpoint(tmp_path / "packed", tmp_path / "dense", overwrite=True)
        assert same_bits(tensors_of(tmp_path / "dense"), tensors_of(form))
        assert verify_packed(tmp_path / "packed", "2:4") == verify_model(dense, "2:4")


def test_experts_of_a_pruned_model_in_memory(pruned_checkpoint):
    dense, folder = pruned_checkpoint("mixtral", "4:8")
    sparse = sparsify(load_model(folder).model, "4:8")
    assert not any(parameter.dim() == 3 for parameter in sparse.parameters())
    assert (logits(sparse) - logits(dense)).abs().max() < 3e-5 * logits(dense).abs().max()
    with pytest.raises(WandappError, match="mul needs it dense"):
        torch.mul(torch.ones(1), sparse.model.layers[0].mlp.experts.down_proj[0])


def test_experts_of_which_one_is_dense_are_loaded_dense(pruned_checkpoint, tmp_path):
    dense, folder = pruned_checkpoint("mixtral", "2:4")
    pack_checkpoint(folder, tmp_path / "packed", skip=(r"layers\.0\.mlp\.experts\.down_proj\.2$",))
    sparse = load_sparse(tmp_path / "packed")
    assert isinstance(sparse.model.layers[0].mlp.experts.down_proj, nn.Parameter)
    assert (logits(sparse) - logits(dense)).abs().max() < 3e-5 * logits(dense).abs().max()
    save_sparse(sparse, tmp_path / "again")
    assert PackedCheckpoint(tmp_path / "again").linears == PackedCheckpoint(tmp_path / "packed").linears


def test_a_missing_expert_is_named(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("mixtral", "2:4")
    pack_checkpoint(folder, tmp_path / "packed")
    path = tmp_path / "packed" / "wandapp" / "packed.json"
    manifest = json.loads(path.read_text())
    lost = "model.layers.0.block_sparse_moe.experts.1.w2"
    manifest["linears"] = [linear for linear in manifest["linears"] if linear["name"] != lost]
    path.write_text(json.dumps(manifest))
    for file in (tmp_path / "packed").glob("*.safetensors"):
        tensors = {name: value for name, value in load_file(file).items() if not name.startswith(lost + ".")}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WandappError, match="do not make up model.layers.0.mlp.experts.down_proj"):
        load_sparse(tmp_path / "packed")
