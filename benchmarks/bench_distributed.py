"""Pruning time of one rank and of several, each pinned to one core of this machine.

    python benchmarks/bench_distributed.py --model smollm2 --samples 16 --seq-len 512 --ranks 1 2

The ceiling of N ranks is N times the speed of one: a dense pass and a pruned pass are shared out, while scores, selection
and checks are repeated by every rank and statistics travel over loopback. Model loading is not counted.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

PINNED = 'exec taskset -c "$LOCAL_RANK" "$0" -m wandapp "$@"'


def run(ranks: int, arguments: list[str]) -> dict:
    """The report of one job whose rank r runs on core r."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--no-python"]
    command = [*launcher, "bash", "-c", PINNED, sys.executable, "prune", *arguments, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if max(options.ranks) > cores:
        sys.exit(f"--ranks {max(options.ranks)}: this machine has {cores} cores, and each rank needs one")
    print(
        f"{platform.processor() or platform.machine()}, {cores} cores; {options.model} {options.method} 2:4, "
        f"{options.samples} samples x {options.seq_len} tokens"
    )
    print(
        f"{'ranks':>5} {'seconds':>8} {'prune':>8} {'forward':>8} {'speed':>6} {'efficiency':>10}  of a matmul on all cores"
    )
    results = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            report = run(
                ranks,
                [
                    options.model,
                    "--method",
                    options.method,
                    "--samples",
                    str(options.samples),
                    "--seq-len",
                    str(options.seq_len),
                    "--calibration",
                    options.calibration,
                    "--out",
                    str(Path(folder) / "out"),
                ],
            )
        results[ranks] = report["seconds"]
        speed = results[options.ranks[0]] / report["seconds"]
        phases = report["seconds_by_phase"]
        print(
            f"{ranks:>5} {report['seconds']:>8.1f} {phases['prune']:>8.1f} {phases['forward']:>8.1f} {speed:>6.2f} "
            f"{speed / ranks * options.ranks[0]:>10.1%}  {report['achieved_gflops'] / report['matmul_gflops']:.0%} of "
            f"{report['matmul_gflops']:.0f} GFLOP/s",
            flush=True,
        )
    print(
        json.dumps(
            {
                "model": options.model,
                "method": options.method,
                "samples": options.samples,
                "seq_len": options.seq_len,
                "seconds": results,
            }
        )
    )


if __name__ == "__main__":
    main()
