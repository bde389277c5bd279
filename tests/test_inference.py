"""Packed models in use: the same logits and the same text as the dense model, through transformers' own generate.

Tolerances on logits, relative to the largest: products are summed in fp32 in another order than torch's. fp32 3e-5 (some
hundred additions of 2^-24 through three blocks); bf16 3e-2 and fp16 4e-3: each block rounds its outputs to 8 and 11 bits.
"""

import copy
import json
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import wandapp
from wandapp import SparseLinear, WandappError, load_model, load_sparse, sparsify
from wandapp import tokenizer as texts
from wandapp.inference import load_either
from wandapp.kernels.pack import pack
from wandapp.modules import TokenLinear
from wandapp.packing import pack_checkpoint, unpack_checkpoint
from wandapp.saving import save_sparse

TOLERANCE = {"float32": 3e-5, "bfloat16": 3e-2, "float16": 4e-3}
PATTERNS = ["2:4", "4:8", "1:4", "0.5"]


@pytest.fixture(scope="module")
def packed_checkpoint(pruned_checkpoint, tmp_path_factory):
    """packed_checkpoint(family, sparsity, dtype, **fields) -> (dense model, packed folder)."""

    def make(*arguments, **fields):
        model, folder = pruned_checkpoint(*arguments, **fields)
        packed = tmp_path_factory.mktemp("packed") / "model"
        pack_checkpoint(folder, packed)
        return model, packed

    return make


def prompt(batch: int = 1, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def largest_difference(left: nn.Module, right: nn.Module, tokens: torch.Tensor) -> float:
    expected = left(tokens).logits.float()
    return float((right(tokens).logits.float() - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def generate(model: nn.Module, tokens: torch.Tensor, **options) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=257, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sparsity", PATTERNS)
def test_logits_equal_the_dense_model_s(packed_checkpoint, sparsity, dtype):
    dense, packed = packed_checkpoint("llama", sparsity, dtype)
    sparse = load_sparse(packed)
    assert sum(isinstance(module, SparseLinear) for module in sparse.modules()) == 21
    for batch, length in ((1, 1), (1, 16), (3, 5), (2, 40)):  # few tokens, many tokens, both ways of sharing them
        assert largest_difference(dense, sparse, prompt(batch, length)) < TOLERANCE[dtype]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_logits_on_every_instruction_set(packed_checkpoint, monkeypatch, isa):
    from wandapp import _C

    if not _C.isa_runs_here(isa):
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("WANDAPP_ISA", isa)
    for sparsity in ("2:4", "0.5"):
        dense, packed = packed_checkpoint("llama", sparsity, "bfloat16")
        assert largest_difference(dense, load_sparse(packed), prompt(2, 4)) < TOLERANCE["bfloat16"]


def test_greedy_text_is_the_dense_model_s_in_every_family(packed_checkpoint, tiny_family):
    dense, packed = packed_checkpoint(tiny_family, "2:4")
    sparse = load_sparse(packed)
    assert any(isinstance(module, SparseLinear) for module in sparse.modules())
    assert not any(value.is_meta for value in [*sparse.parameters(), *sparse.buffers()])
    for batch in (1, 4):
        assert torch.equal(generate(sparse, prompt(batch)), generate(dense, prompt(batch)))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_static_cache_and_unstructured_weights(packed_checkpoint, family):
    dense, packed = packed_checkpoint(family, "0.5")
    sparse = load_sparse(packed)
    expected = generate(dense, prompt(2))
    assert torch.equal(generate(sparse, prompt(2), cache_implementation="static"), expected)


@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_int8_logits_are_those_of_the_rounded_model(pruned_checkpoint, tmp_path, sparsity, dtype):
    _, folder = pruned_checkpoint("llama", sparsity, dtype)
    pack_checkpoint(folder, tmp_path / "packed", storage="int8")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    dense, sparse = load_model(tmp_path / "dense").model, load_sparse(tmp_path / "packed")
    assert {module.values.dtype for module in sparse.modules() if isinstance(module, SparseLinear)} == {torch.int8}
    for batch, length in ((1, 1), (3, 5), (2, 40)):
        assert largest_difference(dense, sparse, prompt(batch, length)) < TOLERANCE[dtype]


def test_int8_scales_stay_fp32_and_the_model_can_be_saved_again(pruned_checkpoint, tmp_path):
    _, folder = pruned_checkpoint("llama", "2:4")
    pack_checkpoint(folder, tmp_path / "packed", storage="int8")
    sparse = load_sparse(tmp_path / "packed")
    module = sparse.model.layers[0].mlp.up_proj
    scale, expected = module.scale.clone(), sparse(prompt()).logits
    assert largest_difference(sparse.bfloat16(), sparse.float(), prompt()) < TOLERANCE["bfloat16"]
    assert module.scale.dtype == torch.float32 and torch.equal(module.scale, scale)
    save_sparse(load_sparse(tmp_path / "packed"), tmp_path / "again")
    again = load_sparse(tmp_path / "again")
    assert torch.equal(again.model.layers[0].mlp.up_proj.values, module.values)
    assert torch.allclose(again(prompt()).logits, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_compiled_model_writes_the_same_text(packed_checkpoint, family):
    """The whole forward in graphs, one registered operator per linear map; aot_eager traces what inductor would compile."""
    dense, packed = packed_checkpoint(family, "2:4")
    sparse = load_sparse(packed)
    expected = generate(dense, prompt(2))
    sparse.forward = torch.compile(sparse.forward, backend="aot_eager")
    assert torch.equal(generate(sparse, prompt(2)), expected)
    with torch.no_grad():
        graphs = torch._dynamo.explain(load_sparse(packed).forward)(prompt(2), use_cache=False)
    assert graphs.graph_count == 1, graphs.break_reasons


def test_a_copy_saves_itself(packed_checkpoint, tmp_path):
    """save_pretrained belongs to the instance, so a copy must not save the model that it was copied from."""
    sparse = load_sparse(packed_checkpoint("llama", "2:4")[1])
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        other.model.norm.weight.fill_(3.0)
    other.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").model.model.norm.weight.eq(3.0).all()


def test_tied_embeddings_stay_tied_and_biases_arrive(packed_checkpoint):
    _, packed = packed_checkpoint("qwen2", "2:4", tie_word_embeddings=True)
    sparse = load_sparse(packed)
    assert sparse.get_input_embeddings().weight is sparse.get_output_embeddings().weight
    assert sparse.model.layers[0].self_attn.q_proj.bias.abs().max() > 0


def test_dtype_is_converted_on_the_way(packed_checkpoint):
    dense, packed = packed_checkpoint("llama", "2:4")
    sparse = load_sparse(packed, dtype="bfloat16")
    assert {value.dtype for value in sparse.parameters()} == {torch.bfloat16}
    assert sparse.model.layers[0].mlp.up_proj.values.dtype == torch.bfloat16
    assert largest_difference(dense, sparse, prompt()) < TOLERANCE["bfloat16"]
    assert largest_difference(dense, sparse.float(), prompt()) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparsify_in_memory(pruned_checkpoint, family):
    dense, folder = pruned_checkpoint(family, "4:8")
    model = load_model(folder).model
    first = dense.get_submodule("model.layers.0.mlp.up_proj" if family == "llama" else "transformer.h.0.mlp.c_fc")
    weights = [weakref.ref(module.weight) for module in model.modules() if type(module) is type(first)]
    assert sparsify(model, "4:8") is model
    assert sum(weight() is None for weight in weights) >= 12, "the dense weights are still there"
    assert largest_difference(dense, model, prompt(2, 6)) < TOLERANCE["float32"]
    assert torch.equal(generate(model, prompt()), generate(dense, prompt()))


def test_sparsify_leaves_what_was_skipped_and_names_what_breaks_the_pattern(pruned_checkpoint):
    _, folder = pruned_checkpoint("llama", "4:8")
    model = sparsify(load_model(folder).model, "4:8", skip=("down_proj",))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is SparseLinear
    with pytest.raises(WandappError, match=r"model\.layers\.0\.\S+: row \d+, columns"):
        sparsify(load_model(folder).model, "2:4")


def sparse_linear_pair(bias: bool = True) -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    dense = nn.Linear(32, 24, bias=bias).requires_grad_(False)
    dense.weight[:, ::2] = 0
    return dense, SparseLinear(pack(dense.weight, n=2, m=4), dense.bias)


def test_module_takes_any_leading_shape_and_strides():
    dense, sparse = sparse_linear_pair()
    for x in (
        torch.randn(32),
        torch.randn(2, 3, 32),
        torch.randn(32, 5).T,
        torch.randn(4, 9, 32)[:, -1:],
        torch.randn(0, 32),
    ):
        for _ in range(2):  # the first call checks, the second is prepared
            assert sparse(x).shape == dense(x).shape
            assert torch.allclose(sparse(x), dense(x), atol=1e-5)
    assert torch.equal(sparse.to_dense(), dense.weight)
    assert "2:4" in repr(sparse) and "packed" in sparse.kernel(1) and "packed" in sparse.kernel(500)


def test_module_refuses_wrong_inputs_after_it_was_prepared():
    _, sparse = sparse_linear_pair()
    sparse(torch.randn(1, 32))
    for wrong in (torch.randn(1, 24), torch.randn(1, 32).bfloat16(), torch.randn(1, 64)):
        with pytest.raises(WandappError, match="x must be"):
            sparse(wrong)


def test_module_follows_its_weights():
    """Prepared calls hold addresses, so new weights must be seen."""
    dense, sparse = sparse_linear_pair()
    x = torch.randn(2, 32)
    sparse(x)
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    state["values"] = state["values"] * 2
    state["bias"] = state["bias"] * 2
    sparse.load_state_dict(state, assign=True)
    assert torch.allclose(sparse(x), 2 * dense(x), atol=1e-5)
    sparse.bias = nn.Parameter(dense.bias.clone(), requires_grad=False)
    assert torch.allclose(sparse(x), 2 * dense(x) - dense.bias, atol=1e-5)
    sparse.bias = nn.Parameter(2 * dense.bias, requires_grad=False)
    assert torch.allclose(sparse.bfloat16()(x.bfloat16()).float(), 2 * dense(x), atol=0.1)


def test_torch_compile():
    dense, sparse = sparse_linear_pair()
    block = torch.compile(nn.Sequential(sparse, nn.ReLU()), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 32)
    with torch.no_grad():
        assert torch.allclose(block(x), dense(x).relu(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_embedding_of_single_tokens(packed_checkpoint, dtype):
    _, packed = packed_checkpoint("llama", "2:4", dtype)
    output = load_sparse(packed).get_output_embeddings()
    assert type(output) is TokenLinear
    x = torch.randn(1, 1, output.in_features).to(output.weight.dtype)
    expected = nn.functional.linear(x.double(), output.weight.double())
    assert (output(x).double() - expected).abs().max() <= expected.abs().max() * torch.finfo(x.dtype).eps
    assert output(x.expand(3, 2, -1)).shape == (3, 2, output.out_features)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 32),
        ("intermediate_size", 256),
        ("vocab_size", 2**40),
        ("num_hidden_layers", 2),
        ("head_dim", 2**50),
    ],
)
def test_config_that_does_not_fit_the_weights(packed_checkpoint, field, value):
    _, packed = packed_checkpoint("llama", "2:4")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(WandappError) as caught:
        load_sparse(packed)
    assert "\n" not in str(caught.value)


def test_either_form_is_read_with_its_tokenizer(packed_checkpoint, pruned_checkpoint):
    _, packed = packed_checkpoint("llama", "2:4")
    _, folder = pruned_checkpoint("llama", "2:4")
    left, right = load_either(str(packed)), load_either(str(folder))
    assert texts.generate(*left, "The sea", 6) == texts.generate(*right, "The sea", 6)


def test_public_names():
    assert wandapp.load_sparse is load_sparse and wandapp.pack_checkpoint is pack_checkpoint


def test_generate_command_reads_packed_folders(packed_checkpoint, monkeypatch, capfd):
    from wandapp import cli

    _, packed = packed_checkpoint("llama", "2:4")
    monkeypatch.setattr(sys, "argv", ["wandapp", "generate", str(packed), "The sea", "--max-new-tokens", "4"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and capfd.readouterr().out.startswith("The sea")


def test_bench_command(packed_checkpoint, tmp_path, monkeypatch, capfd):
    from wandapp import bench_inference, cli

    _, packed = packed_checkpoint("llama", "2:4")
    measure, places = bench_inference.measure_loading, []
    figures = {"load_seconds": 1.0, "resident_mib": 1.0}

    def measure_one(folder, dtype, device):  # a process of its own takes seconds, so one of the two
        places.append(folder)
        return measure(folder, dtype, device) if folder == packed else figures

    monkeypatch.setattr(bench_inference, "measure_loading", measure_one)
    monkeypatch.setattr(bench_inference, "COPY_BYTES", 1 << 20)
    options = "--prompt-tokens 20 --new-tokens 4 --rounds 1 --batch 1 --batch 3 --json".split()
    plot = tmp_path / "bench.png"
    monkeypatch.setattr(sys, "argv", ["wandapp", "bench", "inference", str(packed), *options, "--plot", str(plot)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    text, shown = capfd.readouterr()
    assert not caught.value.code and plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(text)
    assert len(places) == 2 and shown.index("copy bandwidth") < shown.index("prefill_ms")
    assert result["rows"]["sparse"]["weights_mib"] < result["rows"]["dense"]["weights_mib"]
    assert result["rows"]["sparse"]["resident_mib"] > 0 and result["rows"]["sparse"]["step_ms_batch_3"] > 0
    assert result["agreement"]["sparse"] == {
        "texts": 3,
        "identical_texts": 3,
        "tokens_until_they_part": 4.0,
        "of_tokens": 4,
    }
    assert {(row["out"], row["in"], row["count"]) for row in result["kernels"]} >= {
        (64, 64, 6),
        (128, 64, 6),
        (64, 128, 3),
    }


class StubLlama:
    """llama_cpp.Llama as far as we call it: it writes 7 for ever."""

    def __init__(self, path, **options):
        assert open(path, "rb").read(4) == b"GGUF" and options["n_gpu_layers"] == 0

    def reset(self): ...

    def eval(self, tokens): ...

    def generate(self, tokens, **options):
        while True:
            yield 7


def test_bench_beside_llama_cpp(packed_checkpoint, monkeypatch, capfd):
    from wandapp import bench_inference, cli

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=StubLlama, __version__="stub"))
    figures = {"load_seconds": 1.0, "resident_mib": 1.0}
    monkeypatch.setattr(bench_inference, "measure_loading", lambda *_: figures)
    monkeypatch.setattr(bench_inference, "COPY_BYTES", 1 << 20)
    _, packed = packed_checkpoint("llama", "2:4", "bfloat16")
    options = "--prompt-tokens 8 --new-tokens 3 --rounds 1 --batch 1 --batch 2 --compare llama.cpp --json".split()
    monkeypatch.setattr(sys, "argv", ["wandapp", "bench", "inference", str(packed), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    text, shown = capfd.readouterr()
    assert not caught.value.code, shown
    result = json.loads(text)
    assert result["rows"]["llama.cpp"]["tokens_per_s_batch_1"] > 0
    assert "tokens_per_s_batch_2" not in result["rows"]["llama.cpp"]
    assert result["llama.cpp"]["precision"] == "bfloat16" and "llama-cpp-python stub" in shown
    assert result["agreement"]["sparse"]["identical_texts"] == 2


def test_llama_cpp_that_is_not_installed_is_one_sentence(packed_checkpoint, monkeypatch, capfd):
    from wandapp import cli

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    _, packed = packed_checkpoint("llama", "2:4")
    monkeypatch.setattr(sys, "argv", ["wandapp", "bench", "inference", str(packed), "--compare", "llama.cpp"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and "pip install llama-cpp-python" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_writes_the_same_text(tiny_model, tmp_path, family):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an optional extra")
    from wandapp.bench_llama_cpp import LlamaCpp

    model = tiny_model(family)[0]
    written, steps = LlamaCpp(model, tmp_path, 64).generate(prompt(), 12)
    assert torch.equal(written, generate(model, prompt(), min_new_tokens=12)[:, 7:]) and len(steps) == 11


def test_what_is_not_written_as_gguf_is_refused(tiny_model, tmp_path):
    from wandapp.bench_llama_cpp import write_gguf

    for family in ("gpt2", "mistral"):  # another architecture; a sliding window
        with pytest.raises(WandappError, match=f"got {family}"):
            write_gguf(tiny_model(family)[0], tmp_path / "model.gguf")
