"""Every GPU kernel on this machine: right first, then fast, against what the machine and the libraries can do.

    python benchmarks/bench_gpu.py --out benchmarks/results/gpu.json [--only correctness decode ...]

Needs torch, triton and this checkout; with nvcc (CUDA_HOME or PATH) it builds the CUDA kernels into a temporary folder, and
without it says so and measures Triton's. WANDAPP_CUDA=0: it builds nothing and measures what is built already. Only the
last section, pruning, asks for more: what wandapp depends on. Takes under 10 minutes on an H100. A section that fails prints
its traceback and the others still run; the exit code is 1 if any failed.

How it measures: inputs rotate through sets of more than four times the L2 cache; a sequence of calls, one per set, is
captured in a CUDA graph, so that neither Python nor launch gaps count ("eager" marks calls that cannot be captured);
the figure is the median over replays of the time per call. GB/s counts the fewest bytes the call must read and write.
"% copy" is relative to the measured bandwidth of a large device copy, bytes read plus bytes written.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # the linear maps of LLaMA-7B
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
CALIBRATION = (128, 2048)  # samples, tokens
DEVICE = "cuda"
ROTATED_BYTES = 256 * 2**20
SECTIONS: dict[str, Callable] = {}


def section(function: Callable) -> Callable:
    SECTIONS[function.__name__] = function
    return function


def make_importable(folder: str) -> None:
    """wandapp and its kernels from this checkout, its extensions from `folder`, installed or not."""
    sys.path.insert(0, str(ROOT))
    import wandapp
    import wandapp.kernels

    wandapp.__path__.append(str(Path(folder, "wandapp")))
    wandapp.kernels.__path__.append(str(ROOT / "kernels"))


def build(folder: str) -> str:
    """Compiles wandapp._CUDA for this GPU, with the headers that torch brings; why not, where there is no nvcc."""
    if os.environ.get("WANDAPP_CUDA") == "0":
        return "WANDAPP_CUDA=0: nothing is built"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc in CUDA_HOME or PATH: CUDA kernels are left out"
    target = Path(folder, "wandapp", "_CUDA" + sysconfig.get_config_var("EXT_SUFFIX"))
    target.parent.mkdir()
    major, minor = torch.cuda.get_device_capability()
    includes = [ROOT / "csrc", Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
    command = [nvcc, "-shared", "-cudart=static", "-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{major}{minor}"]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-I{path}" for path in includes), "-o", str(target)]
    sources = [path for path in sorted(ROOT.glob("csrc/cuda/*.c*")) if path.suffix in (".cpp", ".cu")]
    done = subprocess.run([*command, *sources], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the CUDA kernels failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return f"built for sm_{major}{minor}"


class Bench:
    """Rows of the report, and what failed."""

    def __init__(self, check_seconds: float = 150.0):
        self.rows, self.failures, self.checks, self.skipped = [], {}, 0, 0
        self.check_seconds, self.deadline = check_seconds, math.inf
        self.copy_gb_s = self.matmul_tflops = math.nan

    def attempt(self, name: str, function: Callable):
        """What `function` returns; None when it fails, which is noted, printed, and costs nothing else."""
        try:
            result = function()
            torch.cuda.synchronize()
            return result
        except Exception:  # the one place: a library or GPU that lacks an operation is a result, too
            self.failures[name] = traceback.format_exc()
            print(f"FAIL {name}\n{self.failures[name][-3000:]}", flush=True)

    def check(self, name: str, function: Callable) -> None:
        """Runs one correctness check. Out of time, it only counts."""
        if time.perf_counter() > self.deadline:
            self.skipped += 1
        else:
            self.checks += 1
            self.attempt(name, function)

    def time(
        self, name, shape, calls, *, bytes_moved=None, flops=None, baseline=None, target=None, note="", **how
    ) -> dict | None:
        """Measures and prints one line of the table; None when that failed, which is noted and costs no other line.

        calls     one per set of inputs, or a function that makes them; `how` goes to `measure`
        baseline  (label, timing or None) to give the speedup over
        target    ("copy" or the baseline's label, the ratio to reach)
        """
        timing = self.attempt(f"{name} {shape}", lambda: measure(calls() if callable(calls) else calls, **how))
        if timing is None:
            return None
        row = {"kernel": name, "shape": shape, **timing, "note": note}
        if bytes_moved:
            row["gb_s"] = bytes_moved / timing["us"] / 1e3
            row["of_copy"] = row["gb_s"] / self.copy_gb_s
        if flops:
            row["tflops"] = flops / timing["us"] / 1e6
        if baseline and baseline[1]:
            row["baseline"], row["speedup"] = baseline[0], baseline[1]["us"] / timing["us"]
        reached = row.get("of_copy" if target and target[0] == "copy" else "speedup")
        if target and reached is not None:
            row["target"], row["met"] = f">= {target[1]:g} {target[0]}", bool(reached >= target[1])
        self.rows.append(row)
        print(format_row(row), flush=True)
        return timing


def format_row(row: dict) -> str:
    rate = f"{row['tflops']:7.0f} TF/s" if "tflops" in row else f"{row.get('gb_s', math.nan):7.0f} GB/s"
    share = f"{100 * row['of_copy']:4.0f} % copy" if "of_copy" in row else " " * 11
    speed = f"{row['speedup']:5.2f}x {row['baseline']}" if "speedup" in row else ""
    verdict = f"{row['target']}: {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
    spread = f"[{row['q1']:.1f}, {row['q3']:.1f}]"
    line = f"{row['kernel']:34} {row['shape']:22} {row['us']:9.1f} us {spread:20} {rate} {share}  {speed:22} {verdict}"
    return f"{line} {row['note']}".rstrip() + ("" if row["captured"] else "  (eager)")


def measure(calls: list[Callable], *, capture: bool = True, repeats: int = 15, restore: Callable | None = None) -> dict:
    """Median and quartiles of microseconds per call over a sequence of calls, and whether it ran as a CUDA graph.

    restore  gives calls that change their inputs the old ones back, before each timed sequence
    """
    for call in calls[:2] + calls:
        call()
    torch.cuda.synchronize()
    run, captured = (lambda: [call() for call in calls]), False
    if capture:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = [call() for call in calls]  # noqa: F841 - the graph writes to these
            run, captured = graph.replay, True
        except RuntimeError:  # the call waits for the GPU or allocates: it cannot be captured
            torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        if restore:
            restore()  # in the stream before the first event
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    q1, median, q3 = statistics.quantiles(times, n=4)
    return {"us": median, "q1": q1, "q3": q3, "captured": captured}


def over(inputs: list, function: Callable, *rest, **options) -> Callable:
    """What `Bench.time` wants: a function that makes one call per element of `inputs`."""
    return lambda: [partial(function, one, *rest, **options) for one in inputs]


def sets_for(bytes_per_set: int) -> range:
    return range(max(4, min(64, math.ceil(ROTATED_BYTES / bytes_per_set))))


def launcher(function: str, backend: str) -> Callable:
    """A kernel without the public function's check of its result, which would wait for the GPU."""
    from wandapp.kernels import dispatch

    return dispatch.launcher(function, torch.device(DEVICE), backend)


def backends(function: str) -> list[str]:
    from wandapp.kernels import dispatch

    return [name for name in ("triton", "cuda") if not dispatch.unavailable(function, DEVICE, name)]


def random_weight(rows, cols, dtype=torch.bfloat16):
    return (torch.randn(rows, cols, device=DEVICE) * 0.02).to(dtype)


def weight_24(rows, cols, dtype=torch.bfloat16):
    """Exactly two non-zeros in every group, at random places."""
    order = torch.rand(rows, cols // 4, 4, device=DEVICE).argsort(-1).view(rows, cols)
    return torch.where(order < 2, torch.randn(rows, cols, device=DEVICE) * 0.02 + 0.05, 0.0).to(dtype)


def few_nonzeros(rows, cols, dtype):
    """0 to 2 non-zeros per group."""
    return torch.where(torch.rand(rows, cols, device=DEVICE) < 0.3, 0.0, weight_24(rows, cols).float()).to(dtype)


def relative_error(result, expected) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def require(condition, text: str) -> None:
    if not condition:
        raise AssertionError(text)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@section
def ceilings(bench: Bench) -> None:
    """Device copy bandwidth and bf16 matmul rate; every later figure is relative to these."""
    source = torch.randn(2**29, device=DEVICE)  # 2 GiB
    target, moved = torch.empty_like(source), 2 * source.nbytes
    timing = bench.time("copy, 2 GiB", "", [partial(target.copy_, source)] * 4, bytes_moved=moved)
    bench.copy_gb_s = moved / timing["us"] / 1e3
    left, right = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
    timing = bench.time("bf16 matmul", "8192^3", [partial(torch.mm, left, right)] * 4, flops=2 * 8192**3)
    bench.matmul_tflops = 2 * 8192**3 / timing["us"] / 1e6


@section
def correctness(bench: Bench) -> None:
    """Every Triton and CUDA kernel against the reference, on this GPU, fresh random inputs."""
    bench.deadline = time.perf_counter() + bench.check_seconds
    for group in (check_products, check_layouts, check_packing, check_statistics, check_selection):
        bench.check(f"check group {group.__name__}", partial(group, bench))
    bench.deadline = math.inf
    failed = sum(name.startswith("check ") for name in bench.failures)
    print(f"{bench.checks - failed} of {bench.checks} checks passed, {bench.skipped} left out for lack of time")


def check_selection(bench: Bench) -> None:
    from wandapp.errors import NonFiniteScoreError
    from wandapp.kernels.pack import pack
    from wandapp.kernels.select import prune_nm_, prune_pack_nm_, prune_rows_, select_nm, select_rows

    def compare(select, prune, weight, scale, gradient, options, backend):
        expected = select(weight, scale, gradient, **options, backend="reference")
        require(torch.equal(select(weight, scale, gradient, **options, backend=backend), expected), "masks differ")
        ours, reference = weight.clone(), weight.clone()
        bits = prune(ours, scale, gradient, **options, backend=backend)
        require(torch.equal(bits, prune(reference, scale, gradient, **options, backend="reference")), "bitmasks differ")
        require(torch.equal(ours, reference), "pruned weights differ")
        if "n" in options:
            packed = prune_pack_nm_(weight.clone(), scale, gradient, **options, backend=backend)
            expected = pack(reference, n=options["n"], m=options["m"], backend="reference")
            require(torch.equal(packed.values, expected.values), "packed values differ")
            require(torch.equal(packed.bitmask, expected.bitmask), "packed bitmasks differ")

    def refuses_nan(select, options, backend):
        weight = random_weight(37, 64)
        weight[17, 5] = float("nan")
        try:
            select(weight, **options, backend=backend)
        except NonFiniteScoreError as error:
            require((error.row, error.column) == (17, 5), f"wrong place {error.row}, {error.column}")
        else:
            raise AssertionError("no NonFiniteScoreError")

    cases = {
        "nm": (select_nm, prune_nm_, [{"n": n, "m": m} for n, m in [(2, 4), (1, 4), (4, 8), (3, 16)]]),
        "rows": (select_rows, prune_rows_, [{"keep": keep} for keep in (0, 1, 24, 48)]),
    }
    for kind, (select, prune, all_options) in cases.items():
        for backend in backends(f"select_{kind}"):
            bench.check(f"check select_{kind} NaN {backend}", partial(refuses_nan, select, all_options[1], backend))
            for dtype in DTYPES:
                for rows, cols in [(1, 48), (37, 64), (33, 4112), (256, 4096), (5, 11008), (3, 40000)]:
                    scale, gradient = torch.rand(cols, device=DEVICE), torch.rand(rows, cols, device=DEVICE)
                    tied = torch.randint(-3, 4, (rows, cols), device=DEVICE).to(dtype)
                    for options in all_options if dtype == torch.bfloat16 else all_options[:1]:
                        if cols % options.get("m", 1):
                            continue
                        for weight, terms, alpha in [
                            (random_weight(rows, cols, dtype), (scale, gradient), 100.0),
                            (random_weight(rows, cols, dtype), (scale, None), 0.0),
                            (tied, (None, None), 0.0),
                        ]:
                            bench.check(
                                f"check select_{kind} {backend} {dtype} {rows}x{cols} {options}",
                                partial(compare, select, prune, weight, *terms, options | {"alpha": alpha}, backend),
                            )


def check_statistics(bench: Bench) -> None:
    from wandapp.kernels.column_sumsq import column_sumsq
    from wandapp.kernels.compensate import compensate_block_
    from wandapp.kernels.max_sum import pairwise_max_sum
    from wandapp.kernels.rmsprop import rmsprop_

    def exchanges(rows, other_rows, depth, backend):
        left, right = torch.randn(rows, depth, device=DEVICE), torch.randn(other_rows, depth, device=DEVICE)
        expected = torch.maximum(left.double()[:, None], right.double()[None]).sum(2)
        error = relative_error(pairwise_max_sum(left, right, backend=backend), expected)
        require(error < 1e-5, f"relative error {error:.1e}")

    def sums(x, backend):
        error = relative_error(column_sumsq(x, backend=backend), x.double().square().sum(-2))
        require(error < 1e-5, f"relative error {error:.1e}")

    def compensates(rows, width, options, backend):
        weight = torch.randn(rows, width, device=DEVICE)
        factor = torch.randn(width, width, device=DEVICE).triu() * 0.1 + torch.eye(width, device=DEVICE)
        ours, reference = weight.clone(), weight.clone()
        result = compensate_block_(ours, factor, **options, backend=backend)
        expected = compensate_block_(reference, factor, **options, backend="reference")
        require(torch.equal(result.mask, expected.mask), "masks differ")
        require(relative_error(ours, reference) < 1e-5, f"weights differ by {relative_error(ours, reference):.1e}")
        require(relative_error(result.error, expected.error) < 1e-5, "errors differ")

    def steps(shape, dtype, backend):
        weight, mean_square = torch.randn(shape, device=DEVICE), torch.rand(shape, device=DEVICE)
        gradient, results = torch.randn(shape, device=DEVICE).to(dtype), []
        for name in (backend, "reference"):
            results.append((weight.clone(), mean_square.clone()))
            rmsprop_(results[-1][0], gradient, results[-1][1], lr=1e-3, backend=name)
        for ours, expected in zip(*results, strict=True):
            require(relative_error(ours, expected) < 1e-6, f"differs by {relative_error(ours, expected):.1e}")

    for backend in backends("pairwise_max_sum"):
        for shape in [(1, 1, 1), (37, 65, 33), (200, 200, 1100)]:
            name = f"check pairwise_max_sum {backend} {shape}"
            bench.check(name, partial(exchanges, *shape, backend))
    for backend in backends("rmsprop_"):
        for dtype in DTYPES:
            for shape in [(1,), (37, 65), (512, 4096)]:
                bench.check(f"check rmsprop_ {backend} {dtype} {shape}", partial(steps, shape, dtype, backend))
    for backend in backends("column_sumsq"):
        for dtype in DTYPES:
            for shape in [(1, 1), (37, 65), (2048, 4096), (3, 513, 11008)]:
                x = torch.randn(shape, device=DEVICE).to(dtype)
                bench.check(f"check column_sumsq {backend} {dtype} {shape}", partial(sums, x, backend))
    for backend in backends("compensate_block_"):
        for rows, width in [(1, 8), (37, 128), (512, 128), (100, 64)]:
            mask = torch.rand(rows, width, device=DEVICE) < 0.5
            for options in ({"n": 2, "m": 4}, {"n": 4, "m": 8}, {"mask": mask}):
                bench.check(
                    f"check compensate_block_ {backend} {rows}x{width} {list(options)}",
                    partial(compensates, rows, width, options, backend),
                )


def check_packing(bench: Bench) -> None:
    from wandapp.errors import TooManyNonZerosError
    from wandapp.kernels.pack import pack, unpack

    def packs(weight, n, m, backend):
        ours, expected = pack(weight, n=n, m=m, backend=backend), pack(weight, n=n, m=m, backend="reference")
        require(torch.equal(ours.bitmask, expected.bitmask), "bitmasks differ")
        require(torch.equal(ours.values, expected.values), "values differ")
        if "triton" in backends("unpack"):
            require(torch.equal(unpack(ours, backend="triton"), weight), "unpack(pack(w)) differs from w")

    def refuses(backend):
        weight = few_nonzeros(64, 640, torch.bfloat16)
        for row, column in [(63, 0), (41, 516), (41, 600)]:
            weight[row, column : column + 3] = 1.0
        try:
            pack(weight, n=2, m=4, backend=backend)
        except TooManyNonZerosError as error:
            require((error.row, error.column) == (41, 516), f"wrong place {error.row}, {error.column}")
        else:
            raise AssertionError("no TooManyNonZerosError")

    for backend in backends("pack"):
        bench.check(f"check pack {backend} refuses three non-zeros", partial(refuses, backend))
        for dtype in DTYPES:
            for rows, cols in [(1, 8), (37, 64), (33, 520), (70, 1104), (256, 4096), (128, 11008)]:
                weight = few_nonzeros(rows, cols, dtype)
                for n, m in [(2, 4)] if backend == "cuda" else [(2, 4), (4, 8), (None, None)]:
                    bench.check(
                        f"check pack {backend} {dtype} {rows}x{cols} {n}:{m}", partial(packs, weight, n, m, backend)
                    )


def check_layouts(bench: Bench) -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    from wandapp.kernels.pack import pack
    from wandapp.kernels.pack.cuda import compress24
    from wandapp.kernels.semi_structured import cutlass_layout, knows_cusparselt_order, to_torch_semi_structured

    compiled = "cuda" in backends("pack")

    def cutlass(weight):
        expected = sparse_semi_structured_from_dense_cutlass(weight)
        found = [cutlass_layout(pack(weight, n=2, m=4))]
        for ours in [*found, compress24(weight, layout="cutlass")] if compiled else found:
            require(torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1]), "layout differs")

    def cusparselt(weight):
        values, metadata, _ = compress24(weight, layout="cusparselt")
        blob = torch.cat([values.view(torch.int16).flatten(), metadata.flatten()])
        require(torch.equal(blob, torch._cslt_compress(weight).view(torch.int16).flatten()), "blob differs")

    def multiplies(weight, x):
        error = relative_error(
            F.linear(x, to_torch_semi_structured(pack(weight, n=2, m=4))), x.double() @ weight.double().T
        )
        require(error < 1e-2, f"relative error {error:.1e}")

    for dtype in DTYPES[1:]:
        knows = knows_cusparselt_order(torch.empty(0, device=DEVICE).device, dtype)
        verdict = "as assumed" if knows else "NOT as assumed: torch._cslt_compress is used"
        print(f"cuSPARSELt {torch.backends.cusparselt.version()} {dtype}: metadata order {verdict}")
        for rows, cols in [(32, 64), (96, 576), (256, 4096), (384, 1152)]:
            weight = few_nonzeros(rows, cols, dtype)
            bench.check(f"check cutlass layout {dtype} {rows}x{cols}", partial(cutlass, weight))
            if compiled:
                name = f"check compress24 with bitmask {dtype} {rows}x{cols}"
                bench.check(name, partial(check_pruning_compression, weight))
            x = torch.randn(33, cols, device=DEVICE).to(dtype)
            bench.check(f"check semi-structured product {dtype} {rows}x{cols}", partial(multiplies, weight, x))
        if knows and compiled:
            for rows, cols in [(128, 128), (256, 640), (4096, 11008)]:
                bench.check(
                    f"check cuSPARSELt blob {dtype} {rows}x{cols}", partial(cusparselt, weight_24(rows, cols, dtype))
                )


def check_pruning_compression(weight) -> None:
    """compress24 of a dense weight and this weight's bitmask, which marks two places per group, also where it has fewer."""
    from wandapp.kernels.pack import pack
    from wandapp.kernels.pack.cuda import compress24

    bitmask = pack(weight, n=2, m=4).bitmask
    dense = torch.where(weight == 0, torch.ones_like(weight), weight)
    places = bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=weight.device) & 1
    kept = places.flatten(1)[:, : weight.shape[1]].bool()
    expected = pack(torch.where(kept, dense, torch.zeros_like(dense)), n=2, m=4)
    values, bits, _ = compress24(dense, bitmask)
    require(torch.equal(bits, bitmask), "bitmasks differ")
    require(torch.equal(values, expected.values), "values differ")


def check_products(bench: Bench) -> None:
    from wandapp.kernels.pack import pack
    from wandapp.kernels.sparse_linear import sparse_linear

    def multiplies(x, packed, bias, expected, backend):
        error = relative_error(sparse_linear(x, packed, bias, backend=backend), expected)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[x.dtype]
        require(error < tolerance, f"relative error {error:.1e}, tolerance {tolerance:.0e}")

    for backend in backends("sparse_linear"):
        for dtype in DTYPES[1:] if backend == "cuda" else DTYPES:
            for rows, cols in [(16, 64), (37, 128), (1000, 2112), (4096, 4096), (512, 11008)]:
                weight = few_nonzeros(rows, cols, dtype)
                bias = torch.randn(rows, device=DEVICE).to(dtype) if rows % 2 else None
                patterns = [(2, 4)] if backend == "cuda" else [(2, 4), (None, None)]
                for n, m in patterns:
                    packed = pack(weight, n=n, m=m, backend="reference")
                    for tokens in (1, 2, 3, 5, 8, 9, 16) if n else (1, 5, 16):
                        x = torch.randn(tokens, cols, device=DEVICE).to(dtype)
                        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
                        bench.check(
                            f"check sparse_linear {backend} {dtype} {n}:{m} {rows}x{cols} tokens {tokens}",
                            partial(multiplies, x, packed, bias, expected, backend),
                        )


@section
def select(bench: Bench) -> None:
    """Masks and in-place pruning: bytes are the weight, the terms and the result, once each."""
    for rows, cols in SHAPES:
        shape, elements = f"{rows}x{cols} bf16", rows * cols
        weights = [random_weight(rows, cols) for _ in sets_for(2 * elements)]
        scale, gradient = torch.rand(cols, device=DEVICE), torch.rand(rows, cols, device=DEVICE)

        topk = bench.time("torch.topk 2:4", shape, over(weights, torch_topk_nm, scale), bytes_moved=3 * elements)
        sort = bench.time(
            "torch.sort rows",
            shape,
            over(weights[:2], torch_sort_rows, scale),
            bytes_moved=3 * elements,
            repeats=5,
        )
        for backend in backends("select_nm"):
            call, goal = launcher("select_nm", backend), ("copy", 0.85)
            for n, m in [(2, 4), (4, 8)]:
                bench.time(
                    f"select_nm {n}:{m} {backend}", shape, over(weights, call, scale, None, n=n, m=m, alpha=0.0),
                    bytes_moved=3 * elements, baseline=("topk", topk), target=goal,
                )  # fmt: skip
            with_gradient = over(weights, call, scale, gradient, n=2, m=4, alpha=100.0)
            bench.time(
                f"select_nm 2:4 +gradient {backend}", shape, with_gradient, bytes_moved=7 * elements, target=goal
            )
        time_pruning(bench, shape, weights, scale, sort)
        for backend in backends("select_rows"):
            calls = over(weights, launcher("select_rows", backend), scale, None, keep=cols // 2, alpha=0.0)
            bench.time(f"select_rows 50% {backend}", shape, calls, bytes_moved=3 * elements, baseline=("sort", sort))


def time_pruning(bench: Bench, shape: str, weights: list, scale, sort: dict | None) -> None:
    """What changes its weight: every timed sequence starts from the dense weights again."""
    dense, elements, half = [weight.clone() for weight in weights], weights[0].numel(), weights[0].shape[1] // 2

    def restore():
        for weight, original in zip(weights, dense, strict=True):
            weight.copy_(original)

    for backend in backends("prune_nm_"):
        prune, pack = launcher("prune_nm_", backend), launcher("pack", backend)
        nm = {"n": 2, "m": 4, "alpha": 0.0}

        def apart(weight, prune=prune, pack=pack, nm=nm):
            return prune(weight, scale, None, **nm), pack(weight, n=2, m=4)

        pruning = over(weights, prune, scale, None, **nm)
        goal = ("copy", 0.85)
        moved = 4.125 * elements
        bench.time(f"prune_nm_ 2:4 {backend}", shape, pruning, bytes_moved=moved, target=goal, restore=restore)
        two = bench.time(f"prune_nm_ 2:4, pack {backend}", shape, over(weights, apart), restore=restore)
        fused = over(weights, launcher("prune_pack_nm_", backend), scale, None, **nm)
        bench.time(
            f"prune_pack_nm_ 2:4 {backend}", shape, fused, bytes_moved=5.125 * elements, baseline=("apart", two),
            target=goal, restore=restore,
        )  # fmt: skip
        rows = over(weights, launcher("prune_rows_", backend), scale, None, keep=half, alpha=0.0)
        bench.time(
            f"prune_rows_ 50% {backend}", shape, rows, bytes_moved=moved, baseline=("sort", sort), restore=restore
        )
    restore()


def torch_topk_nm(weight, scale):
    score = weight.abs().float() * scale
    chosen = score.view(-1, 4).topk(2, sorted=False).indices
    return torch.zeros(score.numel() // 4, 4, dtype=torch.bool, device=DEVICE).scatter_(1, chosen, True)


def torch_sort_rows(weight, scale):
    order = (weight.abs().float() * scale).sort(dim=1, stable=True).indices
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, order[:, : weight.shape[1] // 2], False)


@section
def packing(bench: Bench) -> None:
    """compress24 moves 2 + 1 + 1/8 bytes per bf16 weight; clone(), which moves 4, shows what the machine gives."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    for rows, cols in SHAPES:
        shape, elements = f"{rows}x{cols} bf16", rows * cols
        weights, moved = [weight_24(rows, cols) for _ in sets_for(2 * elements)], 3.125 * elements

        bench.time("clone", shape, over(weights, torch.clone), bytes_moved=4 * elements)
        cslt = (
            "cslt_compress",
            bench.time("torch._cslt_compress", shape, over(weights, torch._cslt_compress), bytes_moved=moved),
        )
        convert = over(weights[:2], sparse_semi_structured_from_dense_cutlass)
        bench.time("torch's CUTLASS converter", shape, convert, bytes_moved=moved, repeats=5)
        if "cuda" in backends("pack"):
            from wandapp.kernels.pack.cuda import NO_OFFENDER, compress24

            goal, found = ("copy", 0.8), torch.full((), NO_OFFENDER, device=DEVICE)
            for layout in ("neutral", "cutlass", "cusparselt"):
                calls = over(weights, compress24, layout=layout, offender=found)
                bench.time(f"compress24 {layout}", shape, calls, bytes_moved=moved, baseline=cslt, target=goal)
            masked = over(weights, compress24, compress24(weights[0])[1], offender=found)
            bench.time("compress24 neutral, masked", shape, masked, bytes_moved=3.25 * elements, target=goal)
        for backend in backends("pack"):
            calls = over(weights, launcher("pack", backend), n=2, m=4)
            bench.time(f"pack 2:4 {backend}", shape, calls, bytes_moved=moved, baseline=cslt, capture=backend != "cuda")


@section
def sumsq(bench: Bench) -> None:
    """Column norms of 8 samples of 2048 tokens: one read of the activations."""
    for features in (4096, 11008):
        shape = f"16384x{features} bf16"
        batches = [torch.randn(1, 16384, features, device=DEVICE).bfloat16() for _ in range(4)]
        moved = batches[0].nbytes
        plain = bench.time("x.float().square().sum", shape, over(batches, torch_sumsq), bytes_moved=moved)
        for backend in backends("column_sumsq"):
            calls = over(batches, launcher("column_sumsq", backend))
            bench.time(f"column_sumsq {backend}", shape, calls, bytes_moved=moved, baseline=("torch", plain))


def torch_sumsq(x):
    return x.float().square().sum(1)


@section
def rmsprop(bench: Bench) -> None:
    """One optimiser step of regional optimisation: weight and state are read and written in fp32, a bf16 gradient read."""
    for rows, cols in SHAPES[:2]:
        shape, moved = f"{rows}x{cols} fp32", 18 * rows * cols
        sets = [[torch.rand(rows, cols, device=DEVICE) for _ in range(2)] for _ in range(2)]
        gradient = random_weight(rows, cols)
        plain = bench.time("RMSprop in torch", shape, over(sets, torch_rmsprop, gradient), bytes_moved=moved)
        for backend in backends("rmsprop_"):
            call = launcher("rmsprop_", backend)
            calls = over(
                sets, lambda pair, call=call, gradient=gradient: call(pair[0], gradient, pair[1], 1e-6, 0.99, 1e-8)
            )
            bench.time(
                f"rmsprop_ {backend}", shape, calls, bytes_moved=moved, baseline=("torch", plain), target=("copy", 0.85)
            )


def torch_rmsprop(pair, gradient):
    weight, mean_square = pair
    mean_square.mul_(0.99).addcmul_(gradient.float(), gradient.float(), value=0.01)
    weight.addcdiv_(gradient.float(), mean_square.sqrt().add_(1e-8), value=-1e-6)


@section
def exchanges(bench: Bench) -> None:
    """The worth of every exchange of channels between 512 groups of a 2:4 choice: a matrix product with max."""
    groups, depth = 512, 4096
    left, right = torch.rand(groups, depth, device=DEVICE), torch.rand(groups, depth, device=DEVICE)
    shape, flops = f"{groups}x{groups}, {depth} rows", 2 * groups**2 * depth
    call = launcher("pairwise_max_sum", "reference")
    plain = bench.time("pairwise_max_sum reference", shape, [partial(call, left, right)], flops=flops, repeats=3)
    for backend in backends("pairwise_max_sum"):
        calls = [partial(launcher("pairwise_max_sum", backend), left, right)] * 4
        bench.time(f"pairwise_max_sum {backend}", shape, calls, flops=flops, baseline=("reference", plain))


@section
def compensate(bench: Bench) -> None:
    """SparseGPT's column block: 128 dependent columns, so bound by latency, not by its 16 k operations per row."""
    for rows in (4096, 11008):
        weights = [torch.randn(rows, 128, device=DEVICE) for _ in range(8)]
        factor = torch.randn(128, 128, device=DEVICE).triu() * 0.01 + torch.eye(128, device=DEVICE)

        shape, options = f"{rows}x128 fp32", {"n": 2, "m": 4, "mask": None}
        calls = over(weights[:1], launcher("compensate_block_", "reference"), factor, **options)
        plain = bench.time("compensate_block_ reference", shape, calls, capture=False, repeats=3)
        for backend in backends("compensate_block_"):
            bench.time(
                f"compensate_block_ 2:4 {backend}",
                shape,
                over(weights, launcher("compensate_block_", backend), factor, **options),
                flops=rows * 128 * 128,
                baseline=("reference", plain),
                note="a layer of 4096 columns: 32 calls",
            )


@section
def decode(bench: Bench) -> None:
    """1 to 16 tokens: dense bf16 reads 2 bytes per weight, the packed form 9/8, so 1.78x is the ceiling."""
    from wandapp.kernels.pack import pack

    for rows, cols in SHAPES:
        dense = [weight_24(rows, cols) for _ in sets_for(rows * cols)]
        packed = [pack(weight, n=2, m=4) for weight in dense]
        by_rows = [pack(weight) for weight in dense[:8]]  # the same weights, as an unstructured pattern
        for tokens in (1, 2, 4, 8, 16):
            x = torch.randn(tokens, cols, device=DEVICE).bfloat16()
            shape, moved = f"{rows}x{cols} x{tokens}", rows * cols * 9 // 8
            calls = over(dense, lambda weight, x=x: F.linear(x, weight))
            plain = ("dense", bench.time("F.linear dense", shape, calls, bytes_moved=2 * rows * cols))
            goal = ("dense", 1.5) if tokens <= 8 else None
            for backend in backends("sparse_linear"):
                call = launcher("sparse_linear", backend)
                calls = over(packed, lambda weight, x=x, call=call: call(x, weight, None))
                bench.time(f"sparse_linear {backend}", shape, calls, bytes_moved=moved, baseline=plain, target=goal)
            for walking in [False, True] if "cuda" in backends("sparse_linear") else []:
                call = partial(launcher("sparse_linear", "cuda"), walking=walking)
                calls = over(packed, lambda weight, x=x, call=call: call(x, weight, None))
                name = f"  cuda, {'walking' if walking else 'a strip per block'}"
                bench.time(name, shape, calls, bytes_moved=moved, baseline=plain)
            call = launcher("sparse_linear", "triton")
            calls = over(by_rows, lambda weight, x=x, call=call: call(x, weight, None))
            bench.time("sparse_linear triton, 50 %", shape, calls, bytes_moved=moved, baseline=plain)
            # Converted when it is measured, so that a library that refuses costs this line only.
            calls = partial(library_calls, x, packed)
            bench.time("cuSPARSELt F.linear", shape, calls, bytes_moved=moved, baseline=plain)


def library_calls(x, packed):
    from wandapp.kernels.semi_structured import to_torch_semi_structured

    return [partial(F.linear, x, to_torch_semi_structured(one)) for one in packed]


@section
def prefill(bench: Bench) -> None:
    """Many tokens: cuSPARSELt with each algorithm id that gives the right product (some do not), the fastest kept."""
    from wandapp.kernels.pack import pack
    from wandapp.kernels.semi_structured import cusparselt_blob

    for rows, cols in SHAPES:
        weight = weight_24(rows, cols)
        blob = cusparselt_blob(pack(weight, n=2, m=4))
        for tokens in (2048, 8192):
            x, shape = torch.randn(tokens, cols, device=DEVICE).bfloat16(), f"{rows}x{cols} x{tokens}"
            expected, flops = F.linear(x, weight), 2 * rows * cols * tokens
            plain = bench.time("F.linear dense", shape, [partial(F.linear, x, weight)] * 4, flops=flops)
            quick, wrong, refused = {}, [], 0
            for algorithm in range(40):
                call = partial(torch._cslt_sparse_mm, blob, x.t(), alg_id=algorithm, transpose_result=True)
                try:
                    result = call()
                except RuntimeError:  # not an algorithm for this problem, or not one at all
                    refused += 1
                    continue
                if relative_error(result, expected) > 1e-2:
                    wrong.append(algorithm)
                else:
                    quick[measure([call] * 4, capture=False, repeats=3)["us"]] = algorithm, call
            require(quick, f"no cuSPARSELt algorithm gave the right product; wrong: {wrong}")
            algorithm, call = quick[min(quick)]
            bench.time(
                f"cuSPARSELt algorithm {algorithm}", shape, [call] * 4, flops=flops,
                baseline=("dense", plain), note=f"of {len(quick)} right ones; wrong: {wrong}, refused: {refused}",
            )  # fmt: skip


@section
def pruning(bench: Bench) -> None:
    """A 7B-shaped random Llama of three blocks, 128 x 2048 tokens: the middle block's time, times 32."""
    try:
        import transformers  # noqa: F401

        import wandapp.pipeline  # noqa: F401
    except ImportError as missing:
        print(f"left out: {missing}; this section needs what wandapp depends on: pip install {ROOT}")
        return
    tokens = torch.randint(LLAMA_7B["vocab_size"], CALIBRATION, generator=torch.Generator().manual_seed(0))
    runs: list[tuple[str, dict, int | None]] = [
        ("wanda", {"method": "wanda"}, None),
        ("wanda++", {"method": "wanda++"}, 120),
        ("sparsegpt", {"method": "sparsegpt"}, None),
        ("admm", {"method": "admm"}, None),
        ("--preset best", {"preset": "best"}, 600),
    ]
    for name, options, target_seconds in runs:
        bench.attempt(f"prune {name}", partial(prune_one, bench, tokens, name, options, target_seconds))
        torch.cuda.empty_cache()


def prune_one(bench: Bench, tokens, name: str, options: dict, target_seconds: float | None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from wandapp.pipeline import prune

    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **LLAMA_7B)).to(torch.bfloat16).eval()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    options = options | {"sparsity": "2:4", "device": DEVICE}
    report = prune(model, calibration=tokens, on_progress=lambda progress: seconds.append(progress.seconds), **options)
    block = seconds[1] - seconds[0]
    row = {"kernel": f"prune {name} 2:4", "shape": f"7B block, {'x'.join(map(str, tokens.shape))}"}
    row |= {"seconds_per_block": block, "seconds_for_32_blocks": 32 * block, "phases": report.seconds_by_phase}
    row |= {"peak_gib": report.peak_gib, "achieved_gflops": report.achieved_gflops}
    verdict = ""
    if target_seconds:
        row["met"] = 32 * block < target_seconds
        verdict = f"< {target_seconds} s: {'met' if row['met'] else 'MISSED'}"
    bench.rows.append(row)
    phases = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds_by_phase.items())
    print(
        f"{row['kernel']:34} {row['shape']:22} {block:7.2f} s per block, 32 blocks {32 * block:6.0f} s {verdict}"
        f"  peak {report.peak_gib:.1f} GiB  ({phases})",
        flush=True,
    )


def machine() -> dict:
    properties = torch.cuda.get_device_properties(0)
    triton = importlib.import_module("triton")
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cusparselt": torch.backends.cusparselt.version(),
    }


def run_section(bench: Bench, name: str) -> None:
    print(
        f"\n== {name}: {(SECTIONS[name].__doc__ or '').splitlines()[0] if SECTIONS[name].__doc__ else ''}", flush=True
    )
    start = time.perf_counter()
    bench.attempt(name, lambda: SECTIONS[name](bench))
    torch.cuda.empty_cache()
    print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)


def write(bench: Bench, path: str) -> None:
    """Everything so far as JSON; written after each section, so that a run cut short leaves what it had."""
    result = {"machine": machine(), "copy_gb_s": bench.copy_gb_s, "matmul_tflops": bench.matmul_tflops}
    result |= {"checks": bench.checks, "checks_left_out": bench.skipped, "failures": bench.failures, "rows": bench.rows}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "gpu.json"))
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="run these sections (ceilings always)")
    parser.add_argument("--check-seconds", type=float, default=150.0, help="time for the correctness checks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: no GPU that torch can use here; nothing was measured", file=sys.stderr)
        return 1
    bench = Bench(options.check_seconds)
    torch.manual_seed(int(time.time()))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        built = "not built"
        try:
            built = build(folder)
        except RuntimeError as error:
            bench.failures["build"] = str(error)
            print(f"FAIL build\n{error}", flush=True)
        make_importable(folder)
        print(f"{built} ({time.perf_counter() - start:.0f} s)\n{machine()}", flush=True)
        for name in SECTIONS:
            if name == "ceilings" or not options.only or name in options.only:
                run_section(bench, name)
                write(bench, options.out)
    missed = [f"{row['kernel']} {row['shape']}" for row in bench.rows if row.get("met") is False]
    print(f"\n{sum(row.get('met') is True for row in bench.rows)} targets met, {len(missed)} missed: {missed}")
    print(f"{len(bench.failures)} failures: {list(bench.failures)}")
    print(json.dumps({"copy_gb_s": bench.copy_gb_s, "matmul_tflops": bench.matmul_tflops, "checks": bench.checks}))
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
