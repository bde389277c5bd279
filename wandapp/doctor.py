"""What this machine offers wandapp: versions, processor, GPU, compilers, and the kernel backend each op would run."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "gguf", "numpy")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_bf16", "amx_bf16")


def examine() -> dict[str, Any]:
    """Everything `wandapp doctor` prints, as plain JSON types."""
    return {
        "versions": _versions(),
        "processor": _processor(),
        "gpu": _gpus(),
        "nvcc": _nvcc(),
        "backends": _backends(),
    }


def describe_machine(found: dict[str, Any]) -> dict[str, str]:
    """The machine, one line each."""
    cpu, gpus = found["processor"], found["gpu"]
    instructions = " ".join(cpu["instruction_sets"]) or cpu["torch_capability"]
    return {
        "processor": f"{cpu['machine']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['memory_gib']} GiB",
        "instructions": instructions,
        "gpu": "; ".join(f"{g['name']} (sm {g['compute_capability']}, {g['memory_gib']} GiB)" for g in gpus) or "none",
        "nvcc": found["nvcc"] or "not found (searched CUDA_HOME, then PATH)",
    }


def _versions() -> dict[str, str]:
    return {"wandapp": _version("wandapp"), "python": platform.python_version(), **{p: _version(p) for p in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, Any]:
    import torch

    flags = _cpu_flags()
    return {
        "machine": platform.machine(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
    }


def _cpu_flags() -> set[str]:
    """Linux tells; elsewhere the set is empty and torch's own capability is all that is printed."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for gpu in gpus
    ]


def _nvcc() -> str | None:
    """The compiler's release line, searched where the build searches: CUDA_HOME, then PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in answer.splitlines() if "release" in line), nvcc)


def _backends() -> list[dict[str, Any]]:
    from wandapp.kernels.dispatch import table

    return [choice._asdict() for choice in table()]
