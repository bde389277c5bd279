"""The only place that chooses a backend.

A backend of function `f` in folder `op` is the launcher `f_<backend>` in `wandapp.kernels.<op>.<module>`. Modules are
imported when they are chosen, never before: importing wandapp neither starts Triton nor needs it.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from wandapp.errors import BackendUnavailableError, nearest
from wandapp.kernels import FUNCTIONS

MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_impl", "cuda": "cuda"}

# In order of preference. `reference` is an oracle, so it is never here.
AUTOMATIC = {"cpu": ("cpu",), "cuda": ("triton",)}
AUTOMATIC_OVERRIDES: dict[tuple[str, str], tuple[str, ...]] = {}


class Choice(NamedTuple):
    """What runs one function on one kind of device, and why. `availability` holds a reason for each that cannot run."""

    function: str
    device: str
    backend: str | None
    reason: str
    availability: dict[str, str]


def launcher(
    function: str, device: torch.device, backend: str | None = None, *, preferred: tuple[str, ...] | None = None
) -> Callable:
    """The launcher that runs `function` on tensors of `device`; `backend` or WANDAPP_BACKEND forces which.

    preferred  backends for these very inputs, best first; None means the order that holds for the device
    raises  BackendUnavailableError when the forced backend, or every automatic one, cannot run here
    """
    return _load(function, choose(function, device.type, backend, preferred=preferred))


def choose(function: str, device: str, backend: str | None = None, *, preferred: tuple[str, ...] | None = None) -> str:
    """Name of the backend that runs `function` on `device` ("cpu" or "cuda")."""
    forced = forced_backend(backend)
    if forced is not None:
        obstacle = unavailable(function, device, forced)
        if obstacle:
            raise BackendUnavailableError(f"{function}: backend {forced!r} cannot run on {device} tensors: {obstacle}")
        return forced
    names = preference(function, device) if preferred is None else preferred
    obstacles = {name: unavailable(function, device, name) for name in names}
    for name, obstacle in obstacles.items():
        if not obstacle:
            return name
    reasons = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items()) or "none is made for this device"
    raise BackendUnavailableError(f"{function}: no backend can run on {device} tensors ({reasons})")


def forced_backend(backend: str | None = None) -> str | None:
    """The backend asked for by argument, else by WANDAPP_BACKEND, else None. Unknown names are refused."""
    name = backend or os.environ.get("WANDAPP_BACKEND") or None
    if name in (None, "auto"):
        return None
    if name not in MODULES:
        raise BackendUnavailableError(f"unknown backend {name!r}; {nearest(name, MODULES)}")
    return name


def preference(function: str, device: str) -> tuple[str, ...]:
    """Backends that may be chosen automatically, best first."""
    return AUTOMATIC_OVERRIDES.get((function, device), AUTOMATIC.get(device, ()))


def unavailable(function: str, device: str, backend: str) -> str:
    """Why `backend` cannot run `function` on `device` tensors; empty when it can."""
    if backend == "reference":
        return ""
    if not _has_module(FUNCTIONS[function], MODULES[backend]):
        return "this function has no such implementation"
    return {"cpu": _cpu_obstacle, "triton": _triton_obstacle, "cuda": _cuda_obstacle}[backend](device)


def table() -> list[Choice]:
    """One row per function and kind of device, for `wandapp doctor`."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [_choice(function, device) for function in FUNCTIONS for device in devices]


def _choice(function: str, device: str) -> Choice:
    availability = {name: unavailable(function, device, name) for name in MODULES}
    try:
        backend = choose(function, device)
    except BackendUnavailableError as error:
        return Choice(function, device, None, str(error), availability)
    reason = "forced by WANDAPP_BACKEND" if forced_backend() else f"best that can run on {device} tensors"
    return Choice(function, device, backend, reason, availability)


def _cpu_obstacle(device: str) -> str:
    if device != "cpu":
        return "it needs cpu tensors"
    return "" if _find_spec("wandapp._C") else "the C++ extension wandapp._C is not built; reinstall wandapp"


def _triton_obstacle(device: str) -> str:
    if not _find_spec("triton"):
        return "the package triton is not installed"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "it needs a GPU, or TRITON_INTERPRET=1 for tests"


def _cuda_obstacle(device: str) -> str:
    if device != "cuda":
        return "it needs cuda tensors"
    return "" if _find_spec("wandapp._CUDA") else "wandapp was built without nvcc; reinstall it with CUDA_HOME set"


@cache
def _load(function: str, backend: str) -> Callable:
    module = importlib.import_module(f"wandapp.kernels.{FUNCTIONS[function]}.{MODULES[backend]}")
    return getattr(module, f"{function.rstrip('_')}_{backend}")


def _has_module(folder: str, module: str) -> bool:
    return _find_spec(f"wandapp.kernels.{folder}.{module}")


@cache
def _find_spec(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
