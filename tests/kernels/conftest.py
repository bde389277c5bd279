"""Every test of a kernel runs once per way of computing it: the reference, and the C++ code of each instruction set."""

import pytest
import torch

from wandapp import _C

IMPLEMENTATIONS = ["reference", "portable", "avx2", "avx512", "avx512vbmi2", "avx512bf16"]


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request, monkeypatch) -> str:
    """The backend to pass on. For C++ it also pins the instruction set."""
    if request.param == "reference":
        return "reference"
    if not _C.isa_runs_here(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    monkeypatch.setenv("WANDAPP_ISA", request.param)
    return "cpu"


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True, scope="package")
def two_threads():
    """Rows are dealt out to threads, however many the suite runs with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def bits():
    """Function that views a tensor's elements as integers, so that -0.0 and NaN compare by their bits."""

    def view(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])

    return view
