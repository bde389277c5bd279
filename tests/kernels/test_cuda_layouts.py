"""torch's semi-structured layouts, made from the packed form in plain torch."""

import itertools

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from wandapp.errors import WandappError
from wandapp.kernels.pack import Packed, pack, unpack
from wandapp.kernels.semi_structured import cutlass_layout, ordered_blob, to_torch_semi_structured


def sparse_weight(rows, cols, dtype, nonzeros=(0, 1, 2)):
    """Each group holds a random number of non-zeros, drawn from `nonzeros`."""
    generator = torch.Generator().manual_seed(rows + cols)
    groups = rows * cols // 4
    count = torch.tensor(nonzeros)[torch.randint(len(nonzeros), (groups, 1), generator=generator)]
    rank = torch.rand(groups, 4, generator=generator).argsort(1)
    values = torch.randn(groups, 4, generator=generator) + 3
    return torch.where(rank < count, values, 0.0).to(dtype).view(rows, cols)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows,cols", [(32, 64), (96, 192), (256, 448)])
@pytest.mark.parametrize("nonzeros", [(0, 1, 2), (2,), (0, 1)])
def test_cutlass_layout_is_bit_equal_to_torchs_converter(dtype, rows, cols, nonzeros):
    weight = sparse_weight(rows, cols, dtype, nonzeros)
    values, metadata = cutlass_layout(pack(weight, n=2, m=4, backend="reference"))
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values.view(torch.int16), expected_values.view(torch.int16))
    assert torch.equal(metadata, expected_metadata)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), weight)


def test_awkward_values_survive():
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[3, 4:8] = torch.tensor([0.0, float("nan"), 0.0, float("inf")])
    weight[5, 60:] = torch.tensor([2.0**-24, 0.0, 0.0, -(2.0**-24)])
    values, metadata = cutlass_layout(pack(weight, n=2, m=4, backend="reference"))
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values.view(torch.int16), expected_values.view(torch.int16))
    assert torch.equal(metadata, expected_metadata)


@pytest.mark.parametrize("rows,cols", [(128, 128), (384, 256)])
def test_cusparselt_blob_is_values_then_super_tiles(rows, cols):
    weight = sparse_weight(rows, cols, torch.bfloat16)
    blob = ordered_blob(pack(weight, n=2, m=4, backend="reference"))
    expected_values, cutlass = sparse_semi_structured_from_dense_cutlass(weight)
    tiles, words = cutlass.flatten().view(cols // 32, rows // 32, 64), torch.empty(rows * cols // 16, dtype=torch.int16)
    for i, j in itertools.product(range(rows // 32), range(cols // 32)):
        offset = ((j // 2) * (rows // 128) + i // 4) * 512 + (j % 2) * 256 + (i % 4) * 64
        words[offset : offset + 64] = tiles[j, i]
    assert blob.shape == (rows, 9 * cols // 16)
    assert torch.equal(blob.flatten()[: rows * cols // 2].view(rows, cols // 2), expected_values)
    assert torch.equal(blob.flatten()[rows * cols // 2 :].view(torch.int16), words)


def test_other_patterns_and_cpu_tensors_are_refused():
    with pytest.raises(WandappError, match="2:4"):
        to_torch_semi_structured(pack(torch.zeros(32, 64).half(), n=1, m=4, backend="reference"))
    with pytest.raises(WandappError, match="GPU"):
        to_torch_semi_structured(pack(torch.zeros(32, 64).half(), n=2, m=4, backend="reference"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows,cols", [(128, 128), (512, 384), (160, 192)])
def test_on_a_gpu_the_tensor_multiplies_as_the_dense_weight(dtype, rows, cols):
    weight = sparse_weight(rows, cols, dtype).cuda()
    packed = pack(weight, n=2, m=4)
    x = torch.randn(64, cols, device="cuda", dtype=dtype)
    y = torch.nn.functional.linear(x, to_torch_semi_structured(packed))
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-2, atol=0.2)
    assert torch.equal(unpack(Packed(*packed)), weight)
