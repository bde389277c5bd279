"""The CPU kernels beside their floor and beside what they replace: python benchmarks/bench_kernels.py

Prints the machine, the ceilings (copy bandwidth, a dense product), one table per weight type, and a JSON line. Every
figure is a median with quartiles over runs that alternate with the baseline, so that drift of the machine hits both;
compare ratios within one run only.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from wandapp import _C
from wandapp.kernels.column_sumsq import column_sumsq
from wandapp.kernels.compensate import compensate_block_
from wandapp.kernels.native import DTYPE_CODES
from wandapp.kernels.pack import pack, unpack
from wandapp.kernels.select import prune_nm_, prune_rows_, select_nm, select_rows
from wandapp.kernels.sparse_linear import sparse_linear


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def times_ms(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, Tensor]:
    """Quartiles (25, 50, 75 %) of each case in milliseconds. The cases take turns."""
    taken = {name: [] for name in cases}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if turn:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: torch.tensor(ms).quantile(torch.tensor([0.25, 0.5, 0.75])) for name, ms in taken.items()}


def print_table(title: str, quartiles: dict[str, Tensor], baseline: str, faster_is: str) -> list[dict]:
    """Prints one aligned table and returns its rows. `faster_is`: "x copy" (smaller is better) or "x faster"."""
    width = max(map(len, quartiles)) + 2
    print(f"\n{title}\n{'':{width}}{'q25 ms':>10}{'median':>10}{'q75':>10}   {faster_is} ({baseline})")
    floor, rows = quartiles[baseline][1].item(), []
    for name, (low, median, high) in ((name, q.tolist()) for name, q in quartiles.items()):
        ratio = median / floor if faster_is == "x copy" else floor / median
        print(f"{name:{width}}{low:10.2f}{median:10.2f}{high:10.2f}{ratio:8.2f}")
        rows.append({"table": title, "case": name, "q25_ms": low, "median_ms": median, "q75_ms": high, "ratio": ratio})
    return rows


def sort_and_scatter(weight: Tensor, dense: Tensor, scale: Tensor, keep: int) -> None:
    """The row selection of Wanda's authors, as torch operations."""
    weight.copy_(dense)
    score = weight.abs() * scale.to(weight.dtype)
    order = torch.sort(score, dim=-1, stable=True).indices[:, : weight.shape[1] - keep]
    weight[torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)] = 0


def selection(rows: int, cols: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Every case works on a fresh random weight: restoring it is not timed with it, but runs between the cases."""
    dense, scale = torch.randn(rows, cols).to(dtype), torch.rand(cols) + 0.5
    weight, x = dense.clone(), torch.randn(4096, cols).to(dtype)
    restore = {"copy_": lambda: weight.copy_(dense)}
    cases = {
        "prune_nm_ 2:4": lambda: prune_nm_(weight, scale, n=2, m=4),
        "prune_nm_ 4:8": lambda: prune_nm_(weight, scale, n=4, m=8),
        "prune_rows_ 50 %": lambda: prune_rows_(weight, scale, keep=cols // 2),
        "prune_rows_ 50 %, one row": lambda: prune_rows_(weight.view(1, -1), keep=weight.numel() // 2),
    }
    interleaved = {}
    for index, (name, run) in enumerate(cases.items()):
        interleaved |= {"copy_" if index == 0 else " " * index: restore["copy_"], name: run}
    quartiles = times_ms(interleaved, repeats)
    quartiles = {name: q for name, q in quartiles.items() if name.strip()}
    quartiles |= times_ms(
        {
            "select_nm 2:4": lambda: select_nm(dense, scale, n=2, m=4),
            "select_rows 50 %": lambda: select_rows(dense, scale, keep=cols // 2),
            "column_sumsq, 4096 tokens": lambda: column_sumsq(x),
        },
        repeats,
    )
    quartiles |= times_ms({"sort + scatter 50 %": lambda: sort_and_scatter(weight, dense, scale, cols // 2)}, 1)
    return print_table(f"selection, {rows} x {cols} {dtype}", quartiles, "copy_", "x copy")


def dense_in_cpp(x: Tensor, weight: Tensor) -> Tensor:
    """One token times a dense weight, written with the same care as the packed kernels."""
    y = x.new_empty(1, weight.shape[0])
    code, threads = DTYPE_CODES[weight.dtype], torch.get_num_threads()
    _C.dense_linear(weight.data_ptr(), code, *weight.shape, x.data_ptr(), 0, y.data_ptr(), threads, "auto")
    return y


def products(rows: int, cols: int, dtype: torch.dtype, repeats: int, tokens: int) -> list[dict]:
    dense32 = torch.randn(rows, cols)
    dense = dense32.to(dtype)
    of_groups, of_rows = dense.clone(), dense.clone()
    prune_nm_(of_groups, n=2, m=4)
    prune_rows_(of_rows, keep=cols // 2)
    packed_groups, packed_rows = pack(of_groups, n=2, m=4), pack(of_rows)
    x32 = torch.randn(tokens, cols)
    x = x32.to(dtype)
    cases = {
        "torch dense fp32": lambda: linear(x32, dense32),
        f"torch dense {dtype}": lambda: linear(x, dense),
        **({f"own dense {dtype}": lambda: dense_in_cpp(x, dense)} if tokens == 1 and cols % 64 == 0 else {}),
        "packed 2:4": lambda: sparse_linear(x, packed_groups),
        "packed 50 %": lambda: sparse_linear(x, packed_rows),
    }
    if dtype == torch.float32:
        del cases[f"torch dense {dtype}"]
    title = f"x W^T, {tokens} token(s), {rows} x {cols} {dtype}"
    return print_table(title, times_ms(cases, repeats), "torch dense fp32", "x faster")


def packing(rows: int, cols: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    weight = torch.randn(rows, cols).to(dtype)
    target = weight.clone()
    prune_nm_(weight, n=2, m=4)
    packed, unstructured = pack(weight, n=2, m=4), pack(weight)
    cases = {
        "copy_": lambda: target.copy_(weight),
        "pack 2:4": lambda: pack(weight, n=2, m=4),
        "pack 50 %": lambda: pack(weight),
        "unpack 2:4": lambda: unpack(packed),
        "unpack 50 %": lambda: unpack(unstructured),
    }
    return print_table(f"packing, {rows} x {cols} {dtype}", times_ms(cases, repeats), "copy_", "x copy")


def compensation(rows: int, repeats: int) -> list[dict]:
    """One block of 128 columns; the reference is the loop of torch operations."""
    inputs = torch.randn(512, 128)
    factor = torch.linalg.cholesky(torch.linalg.inv(inputs.T @ inputs / 512), upper=True)
    weight = torch.randn(rows, 128)
    cases = {
        "reference 2:4": lambda: compensate_block_(weight, factor, n=2, m=4, backend="reference"),
        "cpu 2:4": lambda: compensate_block_(weight, factor, n=2, m=4),
        "cpu given mask": lambda: compensate_block_(weight, factor, mask=weight > 0),
    }
    return print_table(f"SparseGPT block, {rows} x 128", times_ms(cases, repeats), "reference 2:4", "x faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=["selection", "products", "packing", "compensation"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = f"{cpu_name()}, {args.threads} threads, {_C.best_isa()}, torch {torch.__version__}"
    print(machine)
    big = torch.randn(args.rows, args.cols)
    target = torch.empty_like(big)
    copy_ms = times_ms({"copy": lambda: target.copy_(big)}, args.repeats)["copy"][1].item()
    copy_gb_s = 2 * big.nbytes / copy_ms / 1e6
    print(
        f"ceiling: a warm copy_ of {big.nbytes / 1e6:.0f} MB takes {copy_ms:.1f} ms, {copy_gb_s:.1f} GB/s read + written"
    )
    rows, types = [], (torch.float32, torch.bfloat16)
    for dtype in types:
        if args.only in (None, "selection"):
            rows += selection(args.rows, args.cols, dtype, args.repeats)
        if args.only in (None, "products"):
            for tokens in (1, 4, 16, 64):
                rows += products(args.rows, args.cols, dtype, args.repeats, tokens)
        if args.only in (None, "packing"):
            rows += packing(args.rows, args.cols, dtype, max(args.repeats // 3, 1))
    if args.only in (None, "compensation"):
        rows += compensation(args.rows, max(args.repeats // 5, 1))
    print(json.dumps({"machine": machine, "copy_gb_s": copy_gb_s, "rows": rows}))


if __name__ == "__main__":
    main()
