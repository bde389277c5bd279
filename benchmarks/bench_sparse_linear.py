"""The packed product on a CPU beside dense products and memory: python benchmarks/bench_sparse_linear.py

Decode is bound by the bytes of W, so every row names its GB/s and the share of what a copy moves here. The dense bf16
product is our own, written with the same care; torch's serves as the second baseline. All cases take turns, so that
drift of the machine hits all. Where other work runs beside, the fastest turn says more than the median: both are printed.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from wandapp.doctor import describe_machine, examine
from wandapp.kernels.pack import Packed, pack
from wandapp.kernels.pack.int8 import to_int8
from wandapp.kernels.select import prune_nm_, prune_rows_
from wandapp.kernels.sparse_linear.cpu import dense_linear_of_token_cpu, prepare_cpu

F32, BF16 = torch.float32, torch.bfloat16
TARGETS = [  # one token on 11008 x 4096: a case, its baseline, and how many times as fast it should be
    ("2:4 fp32", "torch fp32", 1.7),
    ("2:4 bf16", "own dense bf16", 1.55),
    ("2:4 bf16", "torch fp32", 2.5),
    ("50 % bf16", "own dense bf16", 1.3),
]


class Case(NamedTuple):
    """One call to time, and the bytes of W that it must read (a copy: read and write)."""

    bytes_moved: int
    run: Callable[[], object]


def weights(rows: int, cols: int) -> dict[str, Tensor | Packed]:
    dense = torch.randn(rows, cols)
    groups, unstructured = dense.clone(), dense.clone()
    prune_nm_(groups, n=2, m=4)
    prune_rows_(unstructured, keep=cols // 2)
    made = {"torch fp32": dense, "torch bf16": dense.to(BF16)}
    for name, weight, nm in (("2:4", groups, {"n": 2, "m": 4}), ("50 %", unstructured, {})):
        made |= {f"{name} fp32": pack(weight, **nm), f"{name} bf16": pack(weight.to(BF16), **nm)}
        made[f"{name} int8, x bf16"] = to_int8(made[f"{name} fp32"])
    return made


def cases(weights: dict[str, Tensor | Packed], tokens: int) -> dict[str, Case]:
    """Every product of `tokens` tokens, and a copy of the fp32 weight."""
    dense = weights["torch fp32"]
    x, target = torch.randn(tokens, dense.shape[1]), torch.empty_like(dense)
    made = {"copy": Case(2 * dense.nbytes, lambda: target.copy_(dense))}
    for name, weight in weights.items():
        x_typed = x.to(BF16) if "bf16" in name else x
        if isinstance(weight, Packed):
            run = prepare_cpu(weight, None, x_typed.dtype)
            made[name] = Case(weight.nbytes, lambda run=run, x=x_typed: run(x))
            continue
        made[name] = Case(weight.nbytes, lambda weight=weight, x=x_typed: linear(x, weight))
        if tokens == 1 and dense.shape[1] % 64 == 0:
            run = dense_linear_of_token_cpu
            own = Case(weight.nbytes, lambda run=run, weight=weight, x=x_typed: run(x, weight, None))
            made[name.replace("torch", "own dense")] = own
    return made


def milliseconds(cases: dict[str, Case], turns: int) -> dict[str, list[float]]:
    """Sorted times of each case; the first turn warms up."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case.run()
            if turn:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(times) for name, times in taken.items()}


def table(tokens: int, cases: dict[str, Case], turns: int) -> list[dict]:
    taken = milliseconds(cases, turns)
    ceiling = cases["copy"].bytes_moved / taken["copy"][0] / 1e6
    dense = taken["torch fp32"]
    print(
        f"\n{tokens} token(s)\n{'':20}{'fastest ms':>11}{'median':>9}{'GB/s':>8}{'of copy':>9}   x torch fp32 (median)"
    )
    rows = []
    for name, times in taken.items():
        fastest, median = times[0], times[len(times) // 2]
        gb_s = cases[name].bytes_moved / fastest / 1e6
        ratios = dense[0] / fastest, dense[len(dense) // 2] / median
        print(
            f"{name:20}{fastest:11.2f}{median:9.2f}{gb_s:8.1f}{gb_s / ceiling:9.0%}{ratios[0]:9.2f} ({ratios[1]:.2f})"
        )
        rows.append({"tokens": tokens, "case": name, "fastest_ms": fastest, "median_ms": median, "gb_s": gb_s})
    return rows


def judge(rows: list[dict]) -> list[dict]:
    """The targets of one token beside what was measured."""
    of_one = {row["case"]: row for row in rows if row["tokens"] == 1}
    print()
    judged = []
    for name, baseline, wanted in TARGETS:
        fastest, median = (of_one[baseline][key] / of_one[name][key] for key in ("fastest_ms", "median_ms"))
        met = "met" if fastest >= wanted else "missed"
        print(f"{name} beside {baseline}: {fastest:.2f}x (medians {median:.2f}x), wanted {wanted}: {met}")
        judged.append({"case": name, "baseline": baseline, "fastest": fastest, "median": median, "wanted": wanted})
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=25, help="turns that the cases of one token take")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 512])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = describe_machine(examine()) | {"torch threads": str(torch.get_num_threads())}
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"weight {args.rows} x {args.cols}; GB/s are bytes of W by the fastest turn")
    made, rows = weights(args.rows, args.cols), []
    for tokens in args.tokens:
        turns = args.turns if tokens <= 16 else max(3, args.turns // 8)
        rows += table(tokens, cases(made, tokens), turns)
    judged = judge(rows) if 1 in args.tokens else []
    print(json.dumps({"machine": machine, "shape": [args.rows, args.cols], "rows": rows, "targets": judged}))


if __name__ == "__main__":
    main()
