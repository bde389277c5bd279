"""Devices and types by the names that people give them."""

import os

import torch

from wandapp.errors import WandappError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RANK_VARIABLES = (("LOCAL_WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))  # which torchrun sets


def resolve_device(name: str) -> torch.device:
    """The torch device that "auto", "cpu", "cuda" or "cuda:N" means here. Under torchrun each rank has its own GPU."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    ranks, local_rank = (int(os.environ.get(key, default)) for key, default in _RANK_VARIABLES)
    if ranks > 1 and device.index is not None:
        raise WandappError(
            f"device {name} is one GPU, and {ranks} ranks run here; use --device cuda: each gets its own"
        )
    if ranks > 1 and count > 1:  # where only one is visible the launcher has given each rank its own
        device = torch.device("cuda", local_rank)
    if (device.index or 0) >= count:
        raise WandappError(
            f"device {device} is not here ({count} CUDA devices are visible); use --device cpu, or fewer ranks"
        )
    return device


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of that name."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES:
        raise WandappError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype}")
    return resolved
