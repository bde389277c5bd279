"""The table of measured kernels: what it chooses, what it refuses, and models that run by it.

No GPU is needed: tables are recorded here, and cuSPARSELt has a stand-in with one algorithm that is wrong and one it lacks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from wandapp import WandappError, load_model, load_sparse, routing
from wandapp.inference import dense_fallbacks, load_either, route
from wandapp.kernels import semi_structured
from wandapp.kernels.pack import Packed, pack, unpack
from wandapp.modules import SparseLinear
from wandapp.packing import pack_checkpoint
from wandapp.routing import Choice, Kernels, RoutingTable

ROWS, COLS = 48, 64


def weight_24(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(ROWS, COLS // 4, 4, generator=generator).argsort(-1).view(ROWS, COLS)
    return torch.where(order < 2, torch.randn(ROWS, COLS, generator=generator), 0.0).to(dtype)


def packed_24(dtype: torch.dtype = torch.bfloat16) -> Packed:
    return pack(weight_24(dtype), n=2, m=4)


def choice(kernel: str) -> Choice:
    return Choice(kernel=kernel, time_us=1.0, dense_us=2.0)


def recorded(shapes: list[str], kernels: dict[int, str]) -> RoutingTable:
    by_tokens = {tokens: choice(kernel) for tokens, kernel in kernels.items()}
    return RoutingTable(machine={"device": "recorded"}, choices=dict.fromkeys(shapes, by_tokens))


SHAPES = [f"{shape} 2:4 float32" for shape in ("64x64", "32x64", "128x64", "64x128")]  # of the tiny llama


@pytest.fixture
def packed_llama(pruned_checkpoint, tmp_path) -> Path:
    pack_checkpoint(pruned_checkpoint("llama", "2:4")[1], tmp_path / "packed")
    return tmp_path / "packed"


def test_a_call_counts_as_the_next_larger_number_of_tokens_that_was_measured():
    table = recorded(["48x64 2:4 bfloat16"], {1: "cuda", 16: "triton", 256: "cusparselt 7"})
    found = {tokens: table.choice(packed_24(), tokens).kernel for tokens in (1, 2, 16, 17, 256, 9999)}
    assert found == {
        1: "cuda",
        2: "triton",
        16: "triton",
        17: "cusparselt 7",
        256: "cusparselt 7",
        9999: "cusparselt 7",
    }
    assert table.choice(packed_24(torch.float32), 1) is None


def test_the_table_is_measured_once_and_kept_under_device_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path / "cache"))
    asked = []

    def measured(packed, tokens):
        asked.append((routing.shape_name(packed), tokens))
        return choice("dense")

    monkeypatch.setattr(routing, "measure", measured)
    device = torch.device("cpu")
    first = routing.table_for([packed_24(), packed_24()], device, tokens=(1, 64))
    assert asked == [("48x64 2:4 bfloat16", 1), ("48x64 2:4 bfloat16", 64)]
    assert routing.table_for([packed_24()], device, tokens=(1, 64)) == first and len(asked) == 2
    routing.table_for([packed_24(torch.float16)], device, tokens=(1, 64))
    assert len(asked) == 4 and len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(torch, "__version__", "99.0")
    routing.table_for([packed_24()], device, tokens=(1,))
    assert len(asked) == 5 and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "text", ["", "{}", '{"machine": {}, "choices": {"a": {"1": {"kernel": "rm -rf"}}}}', "[" * 9999]
)
def test_a_damaged_table_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(WandappError, match=r"table.json: no table of kernels \(.*\); delete it") as caught:
        RoutingTable.read(tmp_path / "table.json")
    assert "\n" not in str(caught.value)


def stand_in(blob, x, *, alg_id, transpose_result):
    """torch._cslt_sparse_mm with three algorithms: one refused, one wrong, one right."""
    assert transpose_result and x.shape[1] % 16 == 0
    if alg_id not in (1, 2):
        raise RuntimeError("no such algorithm")
    return linear(x.t(), weight_24()) + (alg_id == 1)


def test_wrong_algorithms_are_dropped_and_refused_ones_counted(monkeypatch):
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in, raising=False)
    monkeypatch.setattr(routing, "share_with_blob", lambda packed: (packed, None))
    monkeypatch.setattr(routing, "candidates", lambda packed, tokens: [*(f"cusparselt {i}" for i in range(4)), "dense"])
    times = iter([1.0, 5.0])
    monkeypatch.setattr(routing, "_time_us", lambda run, x: next(times))
    found = routing.measure(packed_24(), 50)
    assert found == Choice(kernel="cusparselt 2", time_us=1.0, dense_us=5.0, wrong=["cusparselt 1"], refused=2)


def test_kernels_run_what_the_table_says(monkeypatch):
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in, raising=False)
    monkeypatch.setattr(routing, "share_with_blob", lambda packed: (packed, torch.empty(0)))
    bias = torch.randn(ROWS).bfloat16()
    table = recorded(["48x64 2:4 bfloat16"], {1: "cpu", 8: "dense", 64: "cusparselt 2"})
    kernels = Kernels(table, packed_24(), bias)
    for tokens in (0, 1, 5, 50):
        x = torch.randn(tokens, COLS).bfloat16()
        assert torch.allclose(kernels(x).float(), linear(x, weight_24(), bias).float(), atol=0.1, rtol=0.02)
    assert kernels(torch.ones(2, 3, COLS).bfloat16()).shape == (2, 3, ROWS)
    with pytest.raises(WandappError, match="the table of kernels lacks 48x64 2:4 float32"):
        Kernels(table, packed_24(torch.float32), None)


def test_measuring_finds_the_dense_product_and_a_packed_kernel(monkeypatch):
    monkeypatch.setattr(routing, "candidates", lambda packed, tokens: ["cpu", "dense"])
    found = routing.measure(packed_24(), 1)
    assert found.kernel in ("cpu", "dense") and found.dense_us > 0 and not found.wrong
    assert found.time_us <= found.dense_us


@pytest.mark.parametrize("full", [True, False])
def test_values_lie_in_the_form_of_cusparselt(monkeypatch, full):
    """`full`: each group has two non-zeros; else some have fewer, which torch's converters place otherwise."""
    weight = torch.randn(128, 128).bfloat16()
    weight[:, ::2] = 0
    if not full:
        weight[:, :64][torch.rand(128, 64) < 0.3] = 0
    packed = pack(weight, n=2, m=4)
    monkeypatch.setattr(semi_structured, "cusparselt_blob", semi_structured.ordered_blob)
    shared, blob = semi_structured.share_with_blob(packed)
    assert shared.values.data_ptr() == blob.data_ptr() and blob.nbytes == weight.nbytes * 9 // 16
    assert torch.equal(unpack(shared), weight)
    monkeypatch.setattr(semi_structured, "cusparselt_blob", lambda packed: semi_structured.ordered_blob(packed).flip(0))
    assert semi_structured.share_with_blob(packed)[0] is packed, (
        "values that the library keeps otherwise are not shared"
    )


def test_a_model_runs_by_a_recorded_table(packed_llama, pruned_checkpoint):
    table = recorded(SHAPES, {1: "cpu", 16: "dense", 4096: "dense"})
    sparse = load_sparse(packed_llama, routes=table)
    assert dense_fallbacks(sparse) == {tokens: (21, 21) for tokens in routing.TOKENS if tokens > 1}
    assert (
        sparse.model.layers[0].mlp.up_proj.kernel(1) == "cpu"
        and sparse.model.layers[0].mlp.up_proj.kernel(7) == "dense"
    )
    dense, tokens = pruned_checkpoint("llama", "2:4")[0], torch.arange(9)[None]
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, pad_token_id=257)
    assert torch.equal(sparse.generate(tokens, **options), dense.generate(tokens, **options))


def test_required_sparse_kernels_are_required(packed_llama, pruned_checkpoint):
    load_sparse(packed_llama, require_sparse=True, routes=recorded(SHAPES, {1: "cpu", 4096: "cpu"}))
    with pytest.raises(WandappError, match=r"layers\.0\.\S+: for 64 tokens the dense product was the fastest"):
        load_sparse(packed_llama, require_sparse=True, routes=recorded(SHAPES, {16: "cpu", 64: "dense"}))
    folder = str(pruned_checkpoint("llama", "2:4")[1])
    with pytest.raises(WandappError, match="no packed checkpoint, and sparse kernels were required"):
        load_either(folder, require_sparse=True)
    with pytest.raises(WandappError, match="none of its linear maps is packed"):
        route(load_model(folder).model, require_sparse=True)


def test_a_forced_backend_and_another_device_put_the_table_aside(packed_llama, monkeypatch):
    sparse = load_sparse(packed_llama, routes=recorded(SHAPES, {1: "dense"}))
    assert dense_fallbacks(sparse)
    monkeypatch.setenv("WANDAPP_BACKEND", "cpu")
    assert not dense_fallbacks(sparse)
    monkeypatch.delenv("WANDAPP_BACKEND")
    assert all(module.routes is None for module in sparse.to("meta").modules() if isinstance(module, SparseLinear))


_INTERPRETED = """
import sys, torch
from wandapp import load_model, load_sparse, routing
packed, folder, table = sys.argv[1:]
dense, tokens = load_model(folder).model, torch.arange(5)[None]
options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False, pad_token_id=257)
sparse = load_sparse(packed, routes=routing.RoutingTable.read(table) if table else None)
print(sparse.model.layers[0].mlp.up_proj.kernel(1))
assert torch.equal(sparse.generate(tokens, **options), dense.generate(tokens, **options))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forced", "recorded"])
def test_a_model_runs_in_the_interpreter_of_triton(packed_llama, pruned_checkpoint, tmp_path, way):
    environment = os.environ | {"TRITON_INTERPRET": "1"} | ({"WANDAPP_BACKEND": "triton"} if way == "forced" else {})
    table = tmp_path / "table.json"
    recorded(SHAPES, {1: "triton", 64: "dense"}).write(table)
    arguments = [packed_llama, pruned_checkpoint("llama", "2:4")[1], "" if way == "forced" else table]
    command = [sys.executable, "-c", _INTERPRETED, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0 and run.stdout.strip() == "triton", run.stderr
