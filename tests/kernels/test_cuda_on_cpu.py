"""The CUDA kernels' own text, executed on the CPU over the whole grid, against torch's converters and the equations."""

import fcntl
import hashlib
import importlib.util
import itertools
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from guarded import Guarded
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

import wandapp
from wandapp.errors import BackendUnavailableError
from wandapp.kernels.pack import Packed
from wandapp.kernels.pack.cuda import compress24, pack_cuda
from wandapp.kernels.pack.reference import pack_reference, unpack_reference
from wandapp.kernels.sparse_linear.cuda import sparse_linear_cuda

ROOT = Path(__file__).parents[2]
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NEUTRAL, CUTLASS, CUSPARSELT = range(3)
NO_OFFENDER = 2**63 - 1


@pytest.fixture(scope="module")
def cuda(request, tmp_path_factory):
    """csrc/cuda compiled by the host's C++ compiler, with fibers for threads (cuda_on_cpu.h).

    The library stays in pytest's cache under a hash of its sources: compiling takes longer than all the tests.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    here = Path(__file__).parent
    folders = [ROOT / "csrc", here, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", *(f"-I{folder}" for folder in folders)]
    sources = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*"), *here.glob("cuda_on_cpu.*")])
    content = hashlib.sha256(repr([compiler, flags, *(path.read_bytes() for path in sources)]).encode()).hexdigest()
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    folder = cache.mkdir("cuda_on_cpu") if cache else tmp_path_factory.mktemp("cuda_on_cpu")
    library = folder / f"{content[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may want it too
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([compiler, *flags, here / "cuda_on_cpu.cpp", "-o", unfinished], check=True)
            unfinished.rename(library)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(BITS.get(left.dtype)), right.view(BITS.get(right.dtype)))


def awkward_values(dtype):
    """Non-zeros that a sloppy test for zero, or arithmetic on values, would get wrong."""
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    infinite = [float("nan"), float("inf"), -float("inf")]
    return torch.tensor([1.5, -2.0, *infinite, finfo.smallest_normal / 4, -smallest, finfo.max])


def sparse_weight(rows, cols, dtype, nonzeros=(0, 1, 2), seed=0):
    """Each group holds a random number of non-zeros, drawn from `nonzeros`; some of its zeros are -0.0."""
    generator = torch.Generator().manual_seed(seed)
    groups = rows * cols // 4
    count = torch.tensor(nonzeros)[torch.randint(len(nonzeros), (groups, 1), generator=generator)]
    rank = torch.rand(groups, 4, generator=generator).argsort(1)
    awkward = awkward_values(dtype)
    values = torch.where(
        torch.rand(groups, 4, generator=generator) < 0.2,
        awkward[torch.randint(len(awkward), (groups, 4), generator=generator)],
        torch.randn(groups, 4, generator=generator) + 3,
    )
    zeros = torch.where(torch.rand(groups, 4, generator=generator) < 0.3, -0.0, 0.0)
    return torch.where(rank < count, values, zeros).to(dtype).view(rows, cols)


def compress(cuda, weight, layout, keep=None):
    """The kernel's (values, metadata, offender). Outputs start as garbage that no test value equals."""
    rows, cols = weight.shape
    values = torch.full((rows, cols // 2), -77.0, dtype=weight.dtype)
    metadata = torch.full((rows, (cols + 7) // 8), 0xA5, dtype=torch.uint8)
    offender = torch.tensor(NO_OFFENDER)
    cuda.compress24(
        weight.data_ptr(), weight.stride(0), 0 if keep is None else keep.data_ptr(), rows, cols,
        DTYPE_CODES[weight.dtype], layout, values.data_ptr(), metadata.data_ptr(), offender.data_ptr(), 0, 0,
    )  # fmt: skip
    return values, metadata, int(offender)


def assert_neutral(cuda, weight):
    values, bitmask, offender = compress(cuda, weight, NEUTRAL)
    expected_values, expected_bitmask, _, _ = pack_reference(weight, n=2, m=4)
    assert same_bits(values, expected_values) and torch.equal(bitmask, expected_bitmask)
    assert offender == NO_OFFENDER


def test_every_pattern_gets_the_pair_of_torchs_converter_and_of_the_neutral_form(cuda):
    for nonzero in [mask for mask in range(16) if mask.bit_count() <= 2]:
        dense = torch.tensor([nonzero >> column & 1 for column in range(4)]).half().repeat(32, 16)
        assert cuda.torch_pairs(nonzero) & 15 == int(sparse_semi_structured_from_dense_cutlass(dense)[1][0, 0]) & 15
        assert cuda.neutral_masks(nonzero) & 15 == int(pack_reference(dense, n=2, m=4)[1][0, 0]) & 15


def test_eight_groups_at_once_do_not_touch_each_other(cuda):
    alone = {mask: (cuda.torch_pairs(mask) & 15, cuda.neutral_masks(mask) & 15) for mask in range(16)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        eight = torch.randint(16, (8,), generator=generator).tolist()
        word = sum(mask << 4 * i for i, mask in enumerate(eight))
        assert cuda.torch_pairs(word) == sum(alone[mask][0] << 4 * i for i, mask in enumerate(eight))
        assert cuda.neutral_masks(word) == sum(alone[mask][1] << 4 * i for i, mask in enumerate(eight))
        assert cuda.too_many(word) == sum((mask.bit_count() > 2) << 4 * i for i, mask in enumerate(eight))


def test_a_mask_of_two_becomes_its_columns(cuda):
    for first, second in itertools.combinations(range(4), 2):
        assert cuda.pairs_of_masks((1 << first | 1 << second) * 0x11111111) == (first | second << 2) * 0x11111111


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("rows,cols", [(1, 4), (1, 16), (3, 20), (37, 64), (33, 516), (32, 528), (70, 1100), (5, 12)])
def test_neutral_form_is_bit_equal_to_the_reference(cuda, dtype, rows, cols):
    assert_neutral(cuda, sparse_weight(rows, cols, dtype))


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("start,width", [(0, 128), (4, 64), (8, 48), (16, 512)])
def test_strided_and_unaligned_rows(cuda, dtype, start, width):
    assert_neutral(cuda, sparse_weight(35, 544, dtype)[:, start : start + width])


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected through Linux's mprotect")
@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_nothing_behind_the_last_row_is_read(cuda, dtype):
    """A forbidden page lies there: touching it kills the process."""
    guard = Guarded(after=False)
    assert_neutral(cuda, guard(sparse_weight(3, 20, dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows,cols", [(32, 64), (64, 192), (96, 576), (32, 1088), (128, 512)])
@pytest.mark.parametrize("nonzeros", [(0, 1, 2), (2,), (0,)])
def test_cutlass_layout_is_bit_equal_to_torchs_converter(cuda, dtype, rows, cols, nonzeros):
    weight = sparse_weight(rows, cols, dtype, nonzeros)
    values, metadata, offender = compress(cuda, weight, CUTLASS)
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert same_bits(values, expected_values) and offender == NO_OFFENDER
    assert torch.equal(metadata.view(torch.int16), expected_metadata)


@pytest.mark.parametrize("rows,cols", [(128, 64), (256, 192), (384, 640)])
def test_cusparselt_metadata_is_the_cutlass_tiles_in_super_tiles(cuda, rows, cols):
    weight = sparse_weight(rows, cols, torch.bfloat16)
    values, metadata, _ = compress(cuda, weight, CUSPARSELT)
    expected_values, cutlass = sparse_semi_structured_from_dense_cutlass(weight)
    tiles = cutlass.flatten().view(cols // 32, rows // 32, 64)  # CUTLASS: column after column of 32 x 32 tiles
    expected = torch.empty(rows * cols // 16, dtype=torch.int16)
    for i, j in itertools.product(range(rows // 32), range(cols // 32)):
        offset = ((j // 2) * (rows // 128) + i // 4) * 512 + (j % 2) * 256 + (i % 4) * 64
        expected[offset : offset + 64] = tiles[j, i]
    assert same_bits(values, expected_values)
    assert torch.equal(metadata.view(torch.int16).flatten(), expected)


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("cols", [64, 516, 524])
def test_bitmask_prunes_while_it_compresses(cuda, dtype, cols):
    dense = sparse_weight(40, cols, dtype, nonzeros=(4,))
    mask = sparse_weight(40, cols, torch.float32, seed=1) != 0
    _, keep, _, _ = pack_reference(mask.float(), n=2, m=4)
    values, bitmask, offender = compress(cuda, dense, NEUTRAL, keep)
    packed = Packed(values, bitmask, None, (40, cols), (2, 4))
    bits = keep.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    kept = bits.flatten(1)[:, :cols].bool()
    assert same_bits(unpack_reference(packed), torch.where(kept, dense, 0.0).to(dtype))
    assert offender == NO_OFFENDER


@pytest.mark.parametrize("layout", [NEUTRAL, CUTLASS])
@pytest.mark.parametrize("count", [3, 4])
def test_first_group_with_too_many_nonzeros_is_reported(cuda, layout, count):
    weight = sparse_weight(64, 640, torch.bfloat16)
    for row, column in [(63, 4), (41, 516), (41, 636)]:
        weight[row, column : column + count] = 1.0
    assert compress(cuda, weight, layout)[2] == 41 * 640 + 516
    assert compress(cuda, weight[:32], layout)[2] == NO_OFFENDER


def multiply(cuda, x, packed, bias=None, staged_steps=0, walking_blocks=0):
    rows, cols = packed.shape
    y = torch.full((len(x), rows), -77.0, dtype=x.dtype)
    cuda.staged_linear24(
        x.data_ptr(), packed.values.data_ptr(), packed.bitmask.data_ptr(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), len(x), rows, cols, DTYPE_CODES[x.dtype], staged_steps, walking_blocks,
    )  # fmt: skip
    return y


def packed_weight(rows, cols, dtype, nonzeros=(0, 1, 2)):
    weight = sparse_weight(rows, cols, dtype, nonzeros)
    weight = torch.where(weight.isfinite() & (weight.abs() < 100), weight, 1.25).to(dtype)
    values, bitmask, _, _ = pack_reference(weight, n=2, m=4)
    return Packed(values, bitmask, None, (rows, cols), (2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 16])
@pytest.mark.parametrize("rows,cols", [(16, 64), (37, 128), (17, 1984), (48, 1088)])
def test_sparse_linear_equals_the_dense_product(cuda, dtype, tokens, rows, cols):
    packed = packed_weight(rows, cols, dtype)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(dtype) if rows % 2 else None
    expected = x.double() @ unpack_reference(packed).double().T + (0 if bias is None else bias.double())
    # fp32 sums of a few thousand products: 1e-5 of the result's scale; then one rounding to the storage type
    close = torch.finfo(dtype).eps * expected.abs() + 1e-5 * expected.abs().max()
    assert ((multiply(cuda, x, packed, bias).double() - expected).abs() <= close).all()


def walks():
    """Both dtypes and kernels of one and two token tiles always; between them and on the long rows in the slow run."""
    shapes = [(16, 64, 1), (37, 128, 2), (80, 1984, 2), (150, 2112, 3), (40, 4224, 132)]
    for dtype, tokens, shape in itertools.product([torch.float16, torch.bfloat16], [1, 3, 8, 9, 16], shapes):
        slow = tokens in (3, 8) or (shape[1] > 2000 and tokens != (16 if dtype == torch.float16 else 1))
        yield pytest.param(dtype, tokens, *shape, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("dtype,tokens,rows,cols,blocks", [*walks()])
def test_walking_blocks_equal_the_dense_product(cuda, dtype, tokens, rows, cols, blocks):
    """One strip and several per block, numbers of strips that the blocks do not divide, one to three rounds of steps."""
    packed = packed_weight(rows, cols, dtype)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(dtype) if rows % 2 else None
    expected = x.double() @ unpack_reference(packed).double().T + (0 if bias is None else bias.double())
    close = torch.finfo(dtype).eps * expected.abs() + 1e-5 * expected.abs().max()
    y = multiply(cuda, x, packed, bias, walking_blocks=blocks)
    assert ((y.double() - expected).abs() <= close).all()


def test_sparse_linear_puts_every_column_where_it_belongs(cuda):
    """Powers of two make every sum exact, so each output is compared bit for bit."""
    packed = packed_weight(16, 256, torch.float16, nonzeros=(2,))
    dense = unpack_reference(packed)
    for column in range(0, 256, 37):
        x = torch.zeros(3, 256, dtype=torch.float16)
        x[1, column] = 2.0
        assert torch.equal(multiply(cuda, x, packed), (2 * torch.outer(torch.eye(3)[1], dense[:, column])).half())


@pytest.mark.parametrize("staged_steps", [1, 5, 17])
def test_sparse_linear_stages_x_in_parts(cuda, staged_steps):
    packed = packed_weight(16, 1984, torch.bfloat16)
    x = torch.randn(4, 1984, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.testing.assert_close(multiply(cuda, x, packed, staged_steps=staged_steps), multiply(cuda, x, packed))


def test_a_pruned_weight_does_not_see_an_infinite_input(cuda):
    packed = packed_weight(16, 64, torch.bfloat16, nonzeros=(2,))
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 5] = float("inf")
    pruned = unpack_reference(packed)[:, 5] == 0
    y = multiply(cuda, x, packed)[0]
    assert (y[pruned] == 0).all() and y[~pruned].isinf().all()


@pytest.fixture
def launchers(cuda, monkeypatch):
    """The Python launchers with the CPU module in place of wandapp._CUDA."""
    monkeypatch.setitem(sys.modules, "wandapp._CUDA", cuda)
    monkeypatch.setattr(wandapp, "_CUDA", cuda, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(device_index=0, cuda_stream=0))


@pytest.mark.usefixtures("launchers")
def test_launcher_of_pack_equals_the_reference():
    weight = sparse_weight(37, 68, torch.bfloat16)
    values, bitmask, row_offsets, offender = pack_cuda(weight, n=2, m=4)
    expected_values, expected_bitmask, _, _ = pack_reference(weight, n=2, m=4)
    assert same_bits(values, expected_values) and torch.equal(bitmask, expected_bitmask)
    assert row_offsets is None and offender == -1
    weight[3, 8:11] = 1.0
    assert pack_cuda(weight, n=2, m=4)[3] == 3 * 68 + 8
    with pytest.raises(BackendUnavailableError, match="2:4 only"):
        pack_cuda(weight, n=1, m=4)


@pytest.mark.usefixtures("launchers")
def test_launcher_of_a_librarys_layout_takes_unaligned_rows():
    weight = sparse_weight(32, 64, torch.float16)
    wide = torch.zeros(32, 67, dtype=torch.float16)
    wide[:, 1:65] = weight
    values, metadata, offender = compress24(wide[:, 1:65], layout="cutlass")
    expected_values, expected_metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert same_bits(values, expected_values) and torch.equal(metadata, expected_metadata)
    assert int(offender) == NO_OFFENDER


@pytest.mark.usefixtures("launchers")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_benchmarks_check_of_pruning_compression_holds_for_groups_of_fewer_than_two(dtype):
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "benchmarks" / "bench_gpu.py")
    bench_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_gpu)
    weight = sparse_weight(32, 64, dtype).nan_to_num()
    assert ((weight.view(-1, 4) != 0).sum(1) < 2).any()
    bench_gpu.check_pruning_compression(weight)


@pytest.mark.usefixtures("launchers")
def test_launcher_of_sparse_linear_takes_unaligned_inputs_and_refuses_what_the_kernel_cannot():
    packed = packed_weight(20, 128, torch.float16)
    buffer = torch.randn(3 * 128 + 1, generator=torch.Generator().manual_seed(1)).half()
    x = buffer[1:].view(3, 128)
    torch.testing.assert_close(sparse_linear_cuda(x, packed, None), x @ unpack_reference(packed).T)
    with pytest.raises(BackendUnavailableError, match="1 to 16 tokens, got 17"):
        sparse_linear_cuda(torch.zeros(17, 128).half(), packed, None)
    with pytest.raises(BackendUnavailableError, match="divisible by 64, got 32"):
        sparse_linear_cuda(x[:, :32], packed_weight(20, 32, torch.float16), None)


def test_the_shims_half_precision_is_torchs(cuda):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for value, pattern in zip(bits.view(torch.float16).tolist(), bits.tolist(), strict=True):
        if value == value:
            assert cuda.float16_value(pattern & 0xFFFF) == value
            assert cuda.float16_bits(value) == pattern & 0xFFFF
