"""Every public function as a torch operator: schema and fake kernel (opcheck), torch.compile, no_grad, inference mode."""

import pytest
import torch

from wandapp.kernels import FUNCTIONS
from wandapp.kernels.column_sumsq import column_sumsq
from wandapp.kernels.compensate import compensate_block_
from wandapp.kernels.max_sum import pairwise_max_sum
from wandapp.kernels.pack import pack, unpack
from wandapp.kernels.rmsprop import rmsprop_
from wandapp.kernels.select import prune_nm_, prune_pack_nm_, prune_rows_, select_nm, select_rows
from wandapp.kernels.sparse_linear import sparse_linear

FACTOR = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).triu() * 0.1 + torch.eye(32)
GROUPS, SCATTERED = torch.eye(8).repeat(1, 4), torch.tensor([[0.0, 1.0, 2.0, 0.0] * 8] * 8)
PACKED, PACKED_ROWS = pack(GROUPS, n=2, m=4), pack(SCATTERED)

# function -> calls of it on a weight [8, 32], which it may change; all tensors of a result in one flat list
CALLS = {
    "column_sumsq": [lambda w: [column_sumsq(w)]],
    "select_nm": [lambda w: [select_nm(w, w[0].abs(), w.abs(), n=2, m=4, alpha=0.5)]],
    "select_rows": [lambda w: [select_rows(w, keep=7)]],
    "prune_nm_": [lambda w: [prune_nm_(w, torch.ones(32), n=2, m=4)]],
    "prune_rows_": [lambda w: [prune_rows_(w, None, torch.ones(8, 32), keep=7, alpha=1.0)]],
    "prune_pack_nm_": [lambda w: list(prune_pack_nm_(w, n=3, m=8)[:2])],
    "compensate_block_": [
        lambda w: list(compensate_block_(w, FACTOR, n=2, m=4)),
        lambda w: list(compensate_block_(w, FACTOR, mask=w > 0)),
    ],
    "pack": [lambda w: list(pack(w * GROUPS, n=2, m=4)[:2])],
    "unpack": [lambda w: [unpack(PACKED)], lambda w: [unpack(PACKED_ROWS)]],
    "sparse_linear": [lambda w: [sparse_linear(w, PACKED)], lambda w: [sparse_linear(w, PACKED_ROWS, w[0, :8])]],
    "rmsprop_": [lambda w: [rmsprop_(w, torch.ones(8, 32), torch.ones(8, 32), lr=0.1)][1:]],
    "pairwise_max_sum": [lambda w: [pairwise_max_sum(w, w[:3])]],
}
EACH_CALL = [pytest.param(call, id=f"{name}-{i}") for name, calls in CALLS.items() for i, call in enumerate(calls)]


def arguments(function):
    """The operator's own arguments, in the order of its schema."""
    weight, mask = torch.randn(8, 32), torch.rand(8, 32) < 0.5
    packed = (PACKED.values, PACKED.bitmask, None, None)  # values, bitmask, row_offsets, scale
    rows = (PACKED_ROWS.values, PACKED_ROWS.bitmask, PACKED_ROWS.row_offsets, None)
    scale, gradient = torch.rand(32), torch.rand(8, 32)
    return {
        "column_sumsq": [(weight.view(2, 4, 32),)],
        "select_nm": [(weight, scale, gradient, 2, 4, 0.5)],
        "select_rows": [(weight, None, gradient, 7, 0.5)],
        "prune_nm_": [(weight, scale, None, 2, 4, 0.0)],
        "prune_rows_": [(weight, None, None, 7, 0.0)],
        "prune_pack_nm_": [(weight, scale, gradient, 2, 4, 0.5)],
        "compensate_block_": [(weight, FACTOR, 2, 4, None), (weight, FACTOR, None, None, mask)],
        "pack": [(GROUPS, 2, 4), (SCATTERED, None, None)],
        "unpack": [(*packed, 8, 32, 2, 4, torch.float32, False), (*rows, 8, 32, None, None, torch.float32, True)],
        "sparse_linear": [
            (weight, *packed, None, 8, 32, 2, 4),
            (weight, *rows, weight[0, :8], 8, 32, None, None),
        ],
        "rmsprop_": [(weight, gradient, gradient + 1, 0.1, 0.99, 1e-8)],
        "pairwise_max_sum": [(weight, gradient)],
    }[function]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_schema_and_fake_kernel_hold(function):
    for given in arguments(function):
        utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if (function, given[1:]) != ("pack", (None, None)):  # as many values as non-zeros: no static trace
            utils.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.wandapp, function).default, (*given, None), test_utils=utils)


@pytest.mark.parametrize("call", EACH_CALL)
def test_compiles_into_one_graph_and_equals_eager(call):
    weight = torch.randn(8, 32)
    compiled, eager = weight.clone(), weight.clone()
    expected = call(eager)
    torch._dynamo.reset()
    results = torch.compile(call, backend="aot_eager", fullgraph=True)(compiled)
    assert torch.equal(compiled, eager)
    assert len(results) == len(expected) and all(map(torch.equal, results, expected))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", EACH_CALL)
def test_runs_without_autograd(call, mode):
    weight = torch.randn(8, 32)
    eager = weight.clone()
    expected = call(eager)
    with mode():
        own = weight.clone()  # in inference mode an inference tensor, which may be changed in place
        assert all(map(torch.equal, call(own), expected)) and torch.equal(own, eager)


def test_no_function_is_left_out():
    assert set(CALLS) == set(FUNCTIONS)
