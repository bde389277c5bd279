"""The export for torch's sparse tensors is what torch's own converter makes, and comes back as the dense weight."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from wandapp import WandappError, export_torch_24, load_torch_24
from wandapp.packing import pack_checkpoint


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_state_is_bit_equal_to_torch_s_converter(pruned_checkpoint, tmp_path, form):
    _, folder = pruned_checkpoint("qwen2", "2:4", "bfloat16")
    source = folder
    if form == "packed":
        pack_checkpoint(folder, source := tmp_path / "packed")
    summary = export_torch_24(source, tmp_path / "out")
    dense, exported = tensors_of(folder), tensors_of(tmp_path / "out")
    assert summary.compressed == 21 and not summary.left_dense
    assert summary.dense_bytes == sum(tensor.nbytes for tensor in dense.values())
    assert summary.exported_bytes == sum(tensor.nbytes for tensor in exported.values())
    for name, weight in dense.items():
        if "_proj.weight" not in name:
            assert torch.equal(exported[name], weight)
            continue
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert torch.equal(exported[f"{name}.packed"].view(torch.int16), packed.view(torch.int16))
        assert torch.equal(exported[f"{name}.meta"], meta)


def test_the_loaded_model_holds_torch_s_sparse_tensors(pruned_checkpoint, tmp_path):
    dense, folder = pruned_checkpoint("qwen2", "2:4", "bfloat16", tie_word_embeddings=True)
    export_torch_24(folder, tmp_path / "out")
    model = load_torch_24(tmp_path / "out", device="cpu")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, module in dense.named_modules():
        if name.endswith("_proj"):
            weight = model.get_submodule(name).weight
            assert isinstance(weight.data, SparseSemiStructuredTensorCUTLASS)
            assert torch.equal(weight.data.to_dense(), module.weight)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, dense.model.layers[0].self_attn.q_proj.bias)


def test_what_torch_cannot_hold_stays_dense_with_the_reason(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4", "bfloat16", intermediate_size=80)
    summary = export_torch_24(folder, tmp_path / "out")
    ((reason, names),) = summary.left_dense.items()
    assert "rows not divisible by 32" in reason and len(names) == 9 and summary.compressed == 12
    _, folder = pruned_checkpoint("mixtral", "2:4", "bfloat16")
    summary = export_torch_24(folder, tmp_path / "mixtral")
    assert summary.compressed == 12 and {*summary.left_dense} == {"belong to no nn.Linear"}
    for family, sparsity, said in (
        ("gpt2", "2:4", "12 belong to no nn.Linear"),
        ("llama", "2:4", "give --dtype bfloat16"),
        ("llama", "4:8", "are 2:4, this checkpoint is 4:8"),
    ):
        with pytest.raises(WandappError, match=said):
            export_torch_24(pruned_checkpoint(family, sparsity)[1], tmp_path / "none")


def test_the_command_and_damaged_exports(pruned_checkpoint, tmp_path, monkeypatch, capfd):
    from wandapp import cli

    _, folder = pruned_checkpoint("llama", "2:4")
    command = ["wandapp", "export", folder, tmp_path / "out", "--to", "torch-2:4", "--dtype", "float16", "--json"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert json.loads(capfd.readouterr().out)["compressed"] == 21
    model = load_torch_24(tmp_path / "out", device="cpu")
    assert model.dtype == torch.float16
    state = tmp_path / "out" / "wandapp" / "torch-2of4.json"
    content = state.read_text()
    for damage in (content.replace("q_proj", "qq_proj", 1), content.replace('"version": 1', '"version": 2'), "", "[]"):
        state.write_text(damage)
        with pytest.raises(WandappError):
            load_torch_24(tmp_path / "out", device="cpu")
    with pytest.raises(WandappError, match="no export for torch"):
        load_torch_24(folder, device="cpu")
