"""How fast is each kernel beside a copy of the weight, and beside the torch operations that it replaces?

Every case of one shape takes its turn, round after round, so that drift of the machine hits all of them: compare figures
of one run only. An in-place kernel gets its input back before each turn, outside the clock. On a GPU a turn is timed
by events around one call: launches count, and inputs smaller than L2 stay in it (benchmarks/bench_gpu.py avoids both).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wandapp.bench_kernel_cases import GROUPS, TORCH, Case, Inputs
from wandapp.console import Output
from wandapp.doctor import describe_machine, examine
from wandapp.errors import BackendUnavailableError
from wandapp.kernels import dispatch
from wandapp.layer_shapes import Shape

COPY = "copy_ of W"
CEILING_BYTES = 256 << 20
PATIENCE_SECONDS = 4.0  # a case that has taken longer sits out the remaining rounds


def milliseconds(cases: Sequence[Case], rounds: int, device: torch.device) -> list[Tensor]:
    """Quartiles (25, 50, 75 %) of each case. The cases take turns; the first round warms up."""
    taken: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds + 1):
        for case, times in zip(cases, taken, strict=True):
            if sum(times) > PATIENCE_SECONDS * 1e3:
                continue
            if case.restore:
                case.restore()
            elapsed = _elapsed_ms(case.run, device)
            if turn or elapsed > PATIENCE_SECONDS * 1e3:
                times.append(elapsed)
    return [torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])) for times in taken]


def _elapsed_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def bench_kernels(
    shapes: dict[Shape, list[str]],
    output: Output,
    *,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    groups: Sequence[str] = (),
    backends: Sequence[str] = (),
    rounds: int = 15,
) -> dict[str, Any]:
    """Figures of every op, backend and shape, printed as they come: the copy's bandwidth first, then a table per shape.

    shapes    (out_features, in_features) -> the linear maps that have it
    groups    names in GROUPS; none means all
    backends  of those that can run here; none means all but the reference
    """
    machine = describe_machine(examine()) | {"torch threads": str(torch.get_num_threads())}
    output.rows(machine)
    copy_gb_s = _copy_gb_s(device)
    output.rows({"ceiling": f"a warm copy moves {copy_gb_s:.1f} GB/s, read and written"})
    result: dict[str, Any] = {"machine": machine, "copy_gb_s": copy_gb_s, "rows": [], "left_out": []}
    for shape, names in shapes.items():
        for dtype in dtypes:
            cases, left_out = _cases(Inputs(shape, dtype, device), groups or tuple(GROUPS), tuple(backends))
            result["left_out"] += left_out
            rows = _rows(cases, milliseconds(cases, rounds, device), shape, dtype)
            result["rows"] += rows
            _show(rows, left_out, names, output)
    return result


def _copy_gb_s(device: torch.device) -> float:
    """Bytes read and written by a copy that no cache holds."""
    source, target = torch.ones(2, CEILING_BYTES // 4, device=device)
    ceiling = Case(COPY, TORCH, 2 * CEILING_BYTES, lambda: target.copy_(source))
    return ceiling.bytes_moved / milliseconds([ceiling], 5, device)[0][1].item() / 1e6


def _cases(inputs: Inputs, groups: Sequence[str], wanted: Sequence[str]) -> tuple[list[Case], list[str]]:
    """The copy and every case that can run here, each once tried; and why the others cannot."""

    def backends(function: str) -> list[str]:
        able = [name for name in dispatch.MODULES if name != "reference"
                and not dispatch.unavailable(function, inputs.device.type, name)]  # fmt: skip
        return [name for name in able if not wanted or name in wanted]

    cases, left_out = [Case(COPY, TORCH, 2 * inputs.dense.nbytes, inputs.restore)], []
    for group in groups:
        for case in GROUPS[group](inputs, backends):
            try:
                case.run()
                cases.append(case)
            except BackendUnavailableError as error:
                left_out.append(f"{case.op}, {case.backend}: {error}")
    return cases, left_out


def _rows(cases: list[Case], quartiles: list[Tensor], shape: Shape, dtype: torch.dtype) -> list[dict[str, Any]]:
    copy_ms = quartiles[0][1].item()
    torch_ms = {case.op: q[1].item() for case, q in zip(cases, quartiles, strict=True) if case.backend == TORCH}
    rows = []
    for case, (low, median, high) in zip(cases, (q.tolist() for q in quartiles), strict=True):
        row = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "op": case.op, "backend": case.backend}
        row |= {"q25_ms": low, "median_ms": median, "q75_ms": high, "gb_s": case.bytes_moved / median / 1e6}
        row |= {"times_copy": median / copy_ms}
        if case.op in torch_ms and case.backend != TORCH:
            row["faster_than_torch"] = torch_ms[case.op] / median
        rows.append(row)
    return rows


def _show(rows: list[dict[str, Any]], left_out: list[str], names: list[str], output: Output) -> None:
    shape = " x ".join(map(str, rows[0]["shape"]))
    output.result(f"\n{shape} {rows[0]['dtype']}" + (f": {', '.join(names)}" if names else ""))
    lines = [
        [r["op"], r["backend"], *(f"{r[key]:.3f}" for key in ("q25_ms", "median_ms", "q75_ms")), f"{r['gb_s']:.1f}",
         f"{r['times_copy']:.2f}", f"{r['faster_than_torch']:.2f}x" if "faster_than_torch" in r else ""]
        for r in rows
    ]  # fmt: skip
    output.table(["op", "backend", "q25 ms", "median", "q75", "GB/s", "times copy", "faster than torch"], lines)
    for reason in left_out:
        output.result(f"left out: {reason}")
