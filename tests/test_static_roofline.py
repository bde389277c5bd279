"""The kernels' machine code keeps what their design promises; compiled for sm_90 here, without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "static_roofline.py"
LIMIT = 8.8  # thread-instructions a byte: more, and an H100 is not bound by its memory
# What exceeds it, and up to where: a search over scores, running counts over bits, 128 dependent columns; odd rows by element.
OVER_THE_LIMIT = {
    "prune_rows_ 11008": 10.0,
    "wide rows: writing": 13.0,
    "pack 50%: writing": 10.5,
    "sparse_linear 50%": 23.0,
    "compensate": 240.0,
    "pairwise_max_sum": 40.0,  # bound by arithmetic: a maximum and a sum for 1/8 byte
    "odd rows": 11.5,
}
# Diagonal entries; a row's own numbers; values at counted places; no alignment.
BY_ELEMENT = ("compensate", "pairwise", "wide rows", "sparse_linear 50%", "unpack", "odd rows")
QUICK = ("prune_nm_ 2:4 bf16", "prune_pack_nm_ 4:8", "prune_rows_ 4096", "sparse_linear 2:4 bf16 16 x 11008", "cuda")


def roofline(arch: int, *names: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--json", "--arch", str(arch), *(f"--only={name}" for name in names)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])["kernels"]


@pytest.fixture(
    scope="module",
    params=[
        (90, QUICK),
        pytest.param((90, ()), marks=pytest.mark.slow),
        pytest.param((80, ()), marks=pytest.mark.slow),
    ],
    ids=["sm_90, some", "sm_90", "sm_80"],
)
def reports(request):
    arch, names = request.param
    return roofline(arch, *names)


def allowance(table, name, default):
    return next((value for part, value in table.items() if part in name), default)


def test_nothing_spills(reports):
    assert not [(r["name"], r["spill_bytes"]) for r in reports if r["spill_bytes"]]


def test_loads_are_at_least_8_bytes_wide(reports):
    """Of CUDA's 16-bit ones: the bitmask of a chunk (compress24) and a row's bias (products)."""
    for r in reports:
        narrow = {int(bits): count for bits, count in r["load_bits"].items() if int(bits) < 64}
        if r["name"].startswith("cuda"):
            narrow.pop(16, None)
        if not any(part in r["name"] for part in BY_ELEMENT):
            assert r["load_bits"] and not narrow, (r["name"], r["load_bits"])


def test_bytes_stay_within_5_percent_of_the_minimum(reports):
    assert not [(r["name"], r["bytes_ratio"]) for r in reports if r["bytes_ratio"] > 1.05]


def test_instructions_leave_the_memory_the_bottleneck(reports, request):
    if "sm_80" in request.node.name:
        pytest.skip("the limit is an H100's, and loops are told apart by their order in sm_90's code")
    over = [r for r in reports if r["instructions_per_byte"] > allowance(OVER_THE_LIMIT, r["name"], LIMIT)]
    assert not [(r["name"], r["instructions_per_byte"]) for r in over]


def test_every_triton_kernel_is_read():
    root = SCRIPT.parents[1]
    files = [*root.glob("kernels/*/triton*.py"), root / "wandapp" / "kernels" / "triton_groups.py"]
    kernels = {name for path in files for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)}
    assert kernels == set(re.findall(r"\b\w+\.(_\w+_kernel)\b", SCRIPT.read_text()))
