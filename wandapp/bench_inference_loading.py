"""How long loading takes and how much memory a model holds, in a process of its own.

Memory that one form has touched would otherwise hide in the other's figure.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from wandapp.errors import WandappError
from wandapp.inference import load_either
from wandapp.kernels.pack import pack
from wandapp.modules import SparseLinear
from wandapp.skeleton import skeleton


def measure_loading(folder: Path, dtype: str, device: torch.device) -> dict[str, float]:
    """Seconds to load a checkpoint and MiB that then stay resident, beyond what any model needs."""
    options = [str(folder), dtype, str(device), str(torch.get_num_threads())]
    child = subprocess.run(
        [sys.executable, "-m", "wandapp.bench_inference_loading", *options], capture_output=True, text=True
    )
    if child.returncode:
        raise WandappError(f"{folder}: loading it in a process of its own failed: {child.stderr.strip()[-300:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _load_and_tell(folder: str, dtype: str, device: str, threads: str) -> None:
    """The child of `measure_loading`."""
    torch.set_num_threads(int(threads))
    _warm_up(skeleton(folder))  # libraries and their threads are not the model's memory
    before, start = _resident_mib(device), time.perf_counter()
    model = load_either(folder, dtype=dtype, device=device).model
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64, device=device))  # mapped files become resident when they are read
    print(json.dumps({"load_seconds": seconds, "resident_mib": _resident_mib(device) - before}))


def _warm_up(skeleton: nn.Module) -> None:
    """Has torch and our kernels load what any first product loads."""
    for dtype in (torch.float32, skeleton.dtype):
        x = torch.ones(1, 4, 32, 32, dtype=dtype)
        nn.functional.scaled_dot_product_attention(nn.functional.linear(x, x[0, 0]), x, x)
        SparseLinear(pack(torch.eye(32, dtype=dtype), n=2, m=4))(x)


def _resident_mib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _load_and_tell(*sys.argv[1:])
