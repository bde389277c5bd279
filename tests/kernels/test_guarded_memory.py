"""The CPU kernels between pages that may not be touched: a read or write past any buffer kills the process.

Every buffer ends (or begins) exactly at such a page, and the bits and row offsets may be anything: a damaged packed form
gives wrong numbers, never a wrong address.
"""

import ctypes
import faulthandler
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from guarded import Guarded

from wandapp import _C
from wandapp.kernels.native import DTYPE_CODES
from wandapp.kernels.pack import Packed, pack, unpack
from wandapp.kernels.pack.int8 import to_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa in ("portable", "avx2", "avx512", "avx512vbmi2", "avx512bf16") if _C.isa_runs_here(isa)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are protected through Linux's mprotect")


def call_kernels(packed: Packed, tokens: int, dtype: torch.dtype, isa: str, after: bool) -> torch.Tensor:
    """sparse_linear and unpack on guarded copies of everything; y."""
    guard = Guarded(after)
    values, bitmask, row_offsets, scale = (guard(part) for part in packed.parts)
    rows, cols = packed.shape
    n, m = packed.pattern or (0, 0)
    pointers = [0 if part is None else part.data_ptr() for part in (values, bitmask, row_offsets, scale)]
    weight = _C.PackedWeight(*pointers, values.numel(), n, m, DTYPE_CODES[values.dtype], rows, cols)
    x, bias = guard(torch.randn(tokens, cols).to(dtype)), guard(torch.randn(rows).to(dtype))
    y, dense = guard(torch.zeros(tokens, rows).to(dtype)), guard(torch.zeros(rows, cols).to(dtype))
    code = DTYPE_CODES[dtype]
    _C.sparse_linear(weight, code, x.data_ptr(), tokens, bias.data_ptr(), y.data_ptr(), 1, isa)
    _C.unpack(weight, code, 0, rows, dense.data_ptr(), 1, isa)
    return y


def pack_again(packed: Packed, isa: str, after: bool) -> None:
    """Packs what `packed` unpacks to, by `pack` and by `prune_pack_nm_`, on guarded copies; asserts equal bits."""
    guard, dense = Guarded(after), unpack(packed, backend="reference")
    rows, cols = packed.shape
    weight, values, bitmask = (
        guard(dense),
        guard(packed.values.clone().fill_(9)),
        guard(packed.bitmask.clone().fill_(9)),
    )
    args = weight.data_ptr(), cols, DTYPE_CODES[dense.dtype]
    to = _C.PackArgs(*args, rows, cols, values.data_ptr(), bitmask.data_ptr())
    if packed.pattern is None:
        offsets = guard(packed.row_offsets)
        _C.pack_nonzeros(to, offsets.data_ptr(), 2, isa)
    else:
        assert _C.pack_nm(to, *packed.pattern, 2, isa) == -1
    assert torch.equal(values, packed.values) and torch.equal(bitmask, packed.bitmask), isa
    if packed.pattern is not None:
        values.fill_(9), bitmask.fill_(9)
        score = _C.ScoreTerms(*args, 0, 0, 0, 0.0, rows, cols)
        assert _C.select_nm(score, bitmask.data_ptr(), True, values.data_ptr(), *packed.pattern, 2, isa) == -1
        assert torch.equal(values, packed.values) and torch.equal(bitmask, packed.bitmask), isa


def random_case(seed: int, damaged: bool) -> tuple[Packed, int, torch.dtype]:
    """Odd shapes, any pattern and type, rows of zeros, denormals, -0.0; `damaged`: random bits and offsets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    n, m = draw((None, None), (2, 4), (1, 2), (1, 4), (4, 8), (3, 5), (16, 32))
    dtype, tokens = draw(*DTYPES), draw(0, 1, 2, 3, 5, 8, 11, 16, 31, 300)
    rows, groups = draw(0, 1, 2, 7, 33, 64), draw(1, 2, 8, 31, 32, 40)
    cols = groups * (m or draw(1, 4, 8))
    weight = torch.randn(rows, cols, generator=generator)
    keep = torch.rand(rows, cols // (m or 1), m or 1, generator=generator)
    keep = keep.argsort(-1) < n if n else keep < draw(0.0, 0.1, 0.5, 1.0)
    weight = (weight * keep.view(rows, cols)).to(dtype)
    if rows > 1:
        weight[0] = -0.0
        weight[1] = weight[1].sign() * torch.finfo(dtype).smallest_normal / 4
    packed = pack(weight, n=n, m=m)
    packed = to_int8(packed) if draw(False, True) else packed
    if damaged:
        bits = torch.randint(0, 256, packed.bitmask.shape, generator=generator).to(torch.uint8)
        offsets = packed.row_offsets
        if offsets is not None:
            offsets = torch.randint(-(2**62), 2**62, offsets.shape, generator=generator)
            offsets = draw(offsets, packed.row_offsets + 7, packed.row_offsets - 1, packed.row_offsets.flip(0))
        packed = packed._replace(bitmask=draw(bits, torch.full_like(bits, 255)), row_offsets=offsets)
    return packed, tokens, dtype


def run_max_sums() -> None:
    """pairwise_max_sum of sizes that its tiles do not divide, on guarded matrices."""
    for isa, after, (rows, others, cols) in itertools.product(ISAS, (False, True), [(1, 1, 1), (5, 6, 37), (7, 3, 16)]):
        guard = Guarded(after)
        left, right, out = (
            guard(torch.randn(rows, cols)),
            guard(torch.randn(others, cols)),
            guard(torch.zeros(rows, others)),
        )
        _C.pairwise_max_sum(left.data_ptr(), rows, right.data_ptr(), others, cols, out.data_ptr(), 1, isa)
        torch.testing.assert_close(out, torch.maximum(left[:, None], right[None]).sum(2))


def run_cases(first: int, count: int, damaged: bool) -> None:
    """Asserts the sums of intact cases; damaged ones only have to come back."""
    for seed in range(first, first + count):
        packed, tokens, dtype = random_case(seed, damaged)
        for isa in ISAS:
            if packed.scale is None and not damaged:
                pack_again(packed, isa, after=seed % 2 == 1)
            torch.manual_seed(seed)
            y = call_kernels(packed, tokens, dtype, isa, after=seed % 2 == 0)
            if damaged or not y.numel():
                continue
            torch.manual_seed(seed)
            x, bias = torch.randn(tokens, packed.shape[1]).to(dtype), torch.randn(packed.shape[0]).to(dtype)
            weight = unpack(packed, backend="reference").double()
            error = (y.double() - (x.double() @ weight.T + bias.double())).abs()
            size = x.double().abs() @ weight.abs().T + bias.double().abs()
            assert (error <= torch.finfo(dtype).eps * size + 1e-7 + 2e-6 * size).all(), (seed, isa)


def test_no_kernel_leaves_its_buffers():
    """Intact cases, then damaged ones, in a process of its own, which a wrong address would kill."""
    code = f"""import runpy; module = runpy.run_path({__file__!r}); run = module["run_cases"]
module["run_max_sums"](); run(0, 150, False); run(0, 150, True)"""
    paths = os.pathsep.join(filter(None, sys.path))  # pytest's: the helper modules are on it
    environment = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])


def test_the_guard_bites():
    child = os.fork()
    if not child:
        faulthandler.disable()  # pytest's, which would print where
        ctypes.string_at(Guarded(False)(torch.zeros(10)).data_ptr(), 41)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
