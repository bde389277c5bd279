"""Runs the jobs of a sweep file as Ray tasks: on a cluster, or on a Ray of its own where none is running.

    pip install 'wandapp[ray]'
    python examples/ray_sweep.py sweep.yaml

The file, and the folder it names as `out`, must be where every node of the cluster sees them under the same path. A task
asks for one processor, and for one GPU with --gpus; `ray.init()` takes the cluster's address from RAY_ADDRESS.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import ray

from wandapp.sweep import Sweep, state


def run_job(file: str, index: int, folder: str, threads: int) -> int:
    """Exit code of one job, done by the command itself in a process of its own."""
    command = [sys.executable, "-m", "wandapp", "sweep", file, "--job", str(index)]
    return subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="sweep file")
    parser.add_argument("--cpus", type=int, default=1, help="processors, and threads, of each job")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each job; 0.5 lets two share one")
    options = parser.parse_args()
    sweep = Sweep(options.file)
    rows, _ = sweep.results.read()
    pending = [index for index, job in enumerate(sweep.jobs) if state(job, rows) != "done"]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    if not os.environ.get("RAY_ADDRESS"):
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1")
    task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=0)(run_job)
    file, folder = str(Path(options.file).resolve()), os.getcwd()
    codes = ray.get([task.remote(file, index, folder, options.cpus) for index in pending])
    failed = [sweep.jobs[index].name for index, code in zip(pending, codes, strict=True) if code]
    print(f"{len(sweep.jobs) - len(failed)} of {len(sweep.jobs)} jobs are done; results in {sweep.results.path}")
    for name in failed:
        print(f"failed: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
