"""Pruning time of one rank and of several, each pinned to one core of this machine.

    python benchmarks/bench_distributed.py --model smollm2 --samples 16 --seq-len 512 --ranks 1 2

Ceiling: N ranks take 1/N of the time of one. The forwards are shared out; scores, selection and checks are repeated by
every rank, and statistics travel over loopback. Model loading is not counted. CPU seconds are those of the busiest rank:
on a machine that does other work meanwhile, they tell what the ranks would take on cores of their own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    cores = len(os.sched_getaffinity(0))
    if max(options.ranks) > cores:
        sys.exit(f"--ranks {max(options.ranks)}: this machine has {cores} cores, and each rank needs one")
    print(f"{platform.processor() or platform.machine()}, {cores} cores, busy: {os.getloadavg()[0]:.1f} of {cores}")
    print(f"{options.model} {options.method} 2:4, {options.samples} samples x {options.seq_len} tokens")
    print(f"{'ranks':>5} {'seconds':>8} {'ratio':>6} {'CPU s':>7} {'ratio':>6} {'of ceiling':>10}")
    figures = {ranks: launch(ranks) for ranks in options.ranks}
    first = figures[options.ranks[0]]
    for ranks, found in figures.items():
        wall, cpu = (found[key] / first[key] for key in ("seconds", "cpu_seconds"))
        print(
            f"{ranks:>5} {found['seconds']:>8.1f} {wall:>6.2f} {found['cpu_seconds']:>7.1f} {cpu:>6.2f} "
            f"{options.ranks[0] / ranks / cpu:>10.0%}"
        )
    print(json.dumps({**vars(options), "figures": figures}))


def launch(ranks: int) -> dict[str, float]:
    """What rank 0 of `ranks` workers measured."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *sys.argv, "--worker"], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def work(options: argparse.Namespace) -> None:
    """One rank: prunes, and tells seconds and the CPU seconds of the busiest rank."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["LOCAL_RANK"])]})
    import torch

    import wandapp
    from wandapp.distributed import join
    from wandapp.report import MachineRate

    MachineRate.sample = lambda self, repeats=2: None  # its products would count
    with join(torch.device("cpu")) as ranks:
        model, tokenizer = wandapp.load_model(options.model)
        ranks.gather(None)
        wall, cpu = time.perf_counter(), time.process_time()
        wandapp.prune(
            model,
            tokenizer,
            method=options.method,
            calibration=options.calibration,
            samples=options.samples,
            seq_len=options.seq_len,
            device="cpu",
            ranks=ranks,
        )
        busy = max(ranks.gather(time.process_time() - cpu))
        if ranks.is_first:
            print(json.dumps({"seconds": time.perf_counter() - wall, "cpu_seconds": busy}))


if __name__ == "__main__":
    main()
