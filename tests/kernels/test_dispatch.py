import subprocess
import sys
from functools import partial

import pytest
import torch

from wandapp import _C
from wandapp.errors import BackendUnavailableError
from wandapp.kernels import FUNCTIONS, dispatch
from wandapp.kernels.pack import Packed
from wandapp.kernels.select import select_nm
from wandapp.kernels.sparse_linear.cuda import AUTOMATIC_TOKENS
from wandapp.kernels.sparse_linear.cuda import preference as cuda_preference


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    for name in ("WANDAPP_BACKEND", "WANDAPP_ISA", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_cpu_tensors_run_in_cpp_and_never_in_the_reference(function):
    assert dispatch.choose(function, "cpu") == "cpu"
    assert dispatch.choose(function, "cpu", "reference") == "reference"


def test_argument_goes_before_environment(monkeypatch):
    monkeypatch.setenv("WANDAPP_BACKEND", "reference")
    assert dispatch.choose("select_nm", "cpu") == "reference"
    assert dispatch.choose("select_nm", "cpu", "cpu") == "cpu"
    monkeypatch.setenv("WANDAPP_BACKEND", "auto")
    assert dispatch.choose("select_nm", "cpu") == "cpu"


def test_forced_backend_that_cannot_run_says_why():
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run on cpu tensors: it needs a GPU"):
        select_nm(torch.ones(1, 4), n=2, m=4, backend="triton")
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run on cpu tensors"):
        select_nm(torch.ones(1, 4), n=2, m=4, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="'cpu' cannot run on cuda tensors: it needs cpu tensors"):
        dispatch.choose("select_nm", "cuda", "cpu")


def test_unknown_backend_gets_a_proposal():
    with pytest.raises(BackendUnavailableError, match="did you mean 'triton'"):
        dispatch.choose("select_nm", "cpu", "tritn")


def test_preferred_backends_go_in_order_of_those_that_can_run(monkeypatch):
    built = {
        "wandapp._CUDA",
        "triton",
        "wandapp.kernels.sparse_linear.cuda",
        "wandapp.kernels.sparse_linear.triton_impl",
    }
    monkeypatch.setattr(dispatch, "_find_spec", lambda name: name in built)
    choose = partial(dispatch.choose, "sparse_linear", "cuda")
    assert choose(preferred=("cuda", "triton")) == "cuda"
    assert choose(preferred=("triton", "cuda")) == "triton"
    assert choose("triton", preferred=("cuda", "triton")) == "triton"
    built.remove("wandapp._CUDA")
    assert choose(preferred=("cuda", "triton")) == "triton"
    assert choose() == "triton"


def test_cuda_is_preferred_for_the_few_tokens_and_weights_it_is_made_for():
    def packed(cols, dtype=torch.bfloat16, pattern=(2, 4)):
        return Packed(torch.empty(8, cols // 2, dtype=dtype), torch.empty(8, cols // 8), None, (8, cols), pattern)

    for tokens in (1, AUTOMATIC_TOKENS):
        assert cuda_preference(tokens, packed(64)) == ("cuda", "triton")
    assert cuda_preference(AUTOMATIC_TOKENS + 1, packed(64)) == ("triton", "cuda")
    for tokens, weight in [
        (0, packed(64)), (17, packed(64)), (1, packed(72)), (1, packed(64, torch.float32)), (1, packed(64, pattern=(4, 8))),
    ]:  # fmt: skip
        assert cuda_preference(tokens, weight) == ("triton",)


def test_unknown_device_has_no_backend():
    with pytest.raises(BackendUnavailableError, match="no backend can run on xpu tensors"):
        dispatch.choose("select_nm", "xpu")


def test_triton_may_be_forced_in_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("select_nm", "cpu") == "cpu"
    assert dispatch.choose("select_nm", "cpu", "triton") == "triton"


def test_missing_extension_is_reported(monkeypatch):
    monkeypatch.setattr(dispatch, "_find_spec", lambda name: name != "wandapp._C")
    with pytest.raises(BackendUnavailableError, match="wandapp._C is not built"):
        dispatch.choose("select_nm", "cpu")


def test_table_has_a_row_and_a_reason_for_every_function():
    table = dispatch.table()
    assert {row.function for row in table} == set(FUNCTIONS)
    for row in table:
        assert row.reason and set(row.availability) == set(dispatch.MODULES)
        assert row.backend is None or row.availability[row.backend] == ""


def test_table_reports_a_bad_force_instead_of_raising(monkeypatch):
    monkeypatch.setenv("WANDAPP_BACKEND", "cuda")
    assert all(row.backend is None and "cuda" in row.reason for row in dispatch.table() if row.device == "cpu")


def test_kernels_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from wandapp.kernels.select import select_nm\n"
        "assert select_nm(torch.ones(1, 4), n=2, m=4).sum() == 2\n"
        "assert not [name for name in sys.modules if name.startswith('wandapp') and name.endswith('triton_impl')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("WANDAPP_ISA", "avx1024")
    with pytest.raises(ValueError, match="'avx1024' cannot run on this machine; the widest is"):
        select_nm(torch.ones(1, 4), n=2, m=4)


def test_best_instruction_set_runs_here():
    assert _C.isa_runs_here(_C.best_isa()) and _C.isa_runs_here("portable")
