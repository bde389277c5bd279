"""Which kernel multiplies how many tokens by a weight of some shape: measured once on a machine, then looked up.

No rule holds for every shape and GPU: packed kernels win for few tokens, cuSPARSELt for many, and in between, or for small
weights, the dense product of the weight unpacked for the call may win. So every shape is measured with each kernel that
can run it, each result is checked against the dense product in fp32 first (some of cuSPARSELt's algorithms are wrong), and
the table is kept in the user's cache folder under the names and versions it depends on.

On the CPU there is no table: `wandapp.kernels.sparse_linear.cpu` reads the packed weight for any number of tokens.
Not yet measured on hardware: the tests run tables with Triton's interpreter and with a stand-in for cuSPARSELt.
"""

import hashlib
import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn.functional import linear, pad

import wandapp
from wandapp.errors import WandappError
from wandapp.kernels import dispatch
from wandapp.kernels.pack import Packed, unpack
from wandapp.kernels.semi_structured import cusparselt_obstacle, share_with_blob
from wandapp.kernels.sparse_linear import cuda

DENSE = "dense"  # unpack for the call, then torch's product
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)  # measured; a call counts as the next larger one
PACKED_TOKENS = 16  # the packed kernels of the GPU take no more
ALGORITHMS = range(40)  # cuSPARSELt's ids; those that a problem does not have are refused
TOLERANCE = 1e-2  # of the largest output: 16-bit rounding of results, and of products summed in another order
REPEATS = 7
FLUSH_BYTES = 128 << 20  # more than any L2: a decode step finds its weights in memory, not in the cache

Kernel = Callable[[Tensor], Tensor]  # x [tokens, in] -> y [tokens, out]


class Choice(BaseModel):
    """The fastest kernel for one shape and number of tokens, its time, and the dense product's.

    wrong    kernels whose product was wrong here
    refused  how many of cuSPARSELt's algorithm ids the library refused
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: Annotated[str, Field(pattern=r"^(dense|cpu|cuda|triton|cusparselt \d{1,3})$")]
    time_us: float
    dense_us: float
    wrong: list[str] = []
    refused: int = 0


class RoutingTable(BaseModel):
    """Choices by shape ("11008x4096 2:4 bfloat16") and number of tokens, and the machine they hold for."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["wandapp-routes"] = "wandapp-routes"
    version: Literal[1] = 1
    machine: dict[str, str]
    choices: dict[str, dict[int, Choice]] = {}

    @classmethod
    def read(cls, path: str | Path) -> "RoutingTable":
        """The table in a file; WandappError where it is none."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{error.error_count()} faults"
            raise WandappError(f"{path}: no table of kernels ({reason}); delete it, and it is measured again") from None

    def write(self, path: Path) -> None:
        """Complete or not at all, for another process may read it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def choice(self, packed: Packed, tokens: int) -> Choice | None:
        """What was measured for the smallest number of tokens that is not below `tokens`; None: nothing was."""
        by_tokens = self.choices.get(shape_name(packed), {})
        measured = sorted(by_tokens)
        return by_tokens[measured[min(bisect_left(measured, tokens), len(measured) - 1)]] if measured else None


def shape_name(packed: Packed) -> str:
    pattern = "unstructured" if packed.pattern is None else "{}:{}".format(*packed.pattern)
    return f"{packed.shape[0]}x{packed.shape[1]} {pattern} {str(packed.values.dtype).removeprefix('torch.')}"


def machine_key(device: torch.device) -> dict[str, str]:
    """What a measurement depends on."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "torch": torch.__version__,
        "cusparselt": str(
            torch.backends.cusparselt.version() if gpu and torch.backends.cusparselt.is_available() else None
        ),
        "wandapp": wandapp.__version__,
    }


def table_path(machine: dict[str, str]) -> Path:
    """Its file in WANDAPP_CACHE, or in wandapp/ of the user's cache folder."""
    folder = (
        os.environ.get("WANDAPP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wandapp"
    )
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"routes-{digest}.json"


def table_for(weights: Iterable[Packed], device: torch.device, tokens: tuple[int, ...] = TOKENS) -> RoutingTable:
    """The machine's table, after shapes of `weights` that it lacked were measured and written to it."""
    machine = machine_key(device)
    path = table_path(machine)
    table = RoutingTable.read(path) if path.is_file() else RoutingTable(machine=machine)
    shapes = {shape_name(packed): packed for packed in weights}
    missing = {name: packed for name, packed in shapes.items() if name not in table.choices}
    for name, packed in missing.items():
        table.choices[name] = {count: measure(packed, count) for count in tokens}
    if missing:
        table.write(path)
    return table


def measure(packed: Packed, tokens: int) -> Choice:
    """The fastest of all kernels that multiply this weight rightly."""
    generator = torch.Generator(packed.values.device).manual_seed(0)
    shape = (tokens, packed.shape[1])
    x = torch.randn(shape, generator=generator, device=packed.values.device).to(packed.values.dtype)
    expected = linear(x.float(), unpack(packed, trusted=True).float())
    times, wrong, refused = {}, [], 0
    for name in candidates(packed, tokens):
        try:
            run = kernel(name, packed, None)
            error = (run(x).float() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        except RuntimeError:  # cuSPARSELt has no such algorithm for this problem
            if not name.startswith("cusparselt"):
                raise
            refused += 1
            continue
        if error <= TOLERANCE:
            times[name] = _time_us(run, x)
        else:
            wrong.append(name)
    if DENSE not in times:
        raise WandappError(
            f"{shape_name(packed)}: torch's own product is wrong by more than {TOLERANCE} on this device"
        )
    best = min(times, key=times.__getitem__)
    return Choice(kernel=best, time_us=times[best], dense_us=times[DENSE], wrong=wrong, refused=refused)


def candidates(packed: Packed, tokens: int) -> list[str]:
    """Names of the kernels to measure; `DENSE` is always among them."""
    device = packed.values.device.type
    names = []
    if tokens <= PACKED_TOKENS:
        able = {"triton": "", "cuda": cuda.obstacle(tokens, packed)}
        names = [
            name for name, no in able.items() if not no and not dispatch.unavailable("sparse_linear", device, name)
        ]
    elif not cusparselt_obstacle(packed):
        names = [f"cusparselt {algorithm}" for algorithm in ALGORITHMS]
    return [*names, DENSE]


def kernel(name: str, packed: Packed, bias: Tensor | None, blob: Tensor | None = None) -> Kernel:
    """The kernel of that name for one weight. blob: cuSPARSELt's form of it, where it has been made already."""
    if name == DENSE:
        return lambda x: linear(x, unpack(packed, trusted=True), bias)
    if name.startswith("cusparselt"):
        blob = share_with_blob(packed)[1] if blob is None else blob
        return _cusparselt(blob, bias, int(name.split()[1]))
    launch = dispatch.launcher("sparse_linear", packed.values.device, name)
    return lambda x: launch(x, packed, bias)


def _cusparselt(blob: Tensor, bias: Tensor | None, algorithm: int) -> Kernel:
    def run(x: Tensor) -> Tensor:
        padded = pad(x, (0, 0, 0, -len(x) % 16))  # its dense operand comes in multiples of 16 columns
        y = torch._cslt_sparse_mm(blob, padded.t(), alg_id=algorithm, transpose_result=True)[: len(x)]
        return y if bias is None else y + bias

    return run


class Kernels:
    """y = kernels(x) for one weight: each call runs the kernel that the table has for its number of tokens.

    packed  the weight; shares its values with cuSPARSELt's form where the table asks for that and the library permits
    """

    def __init__(self, table: RoutingTable, packed: Packed, bias: Tensor | None):
        by_tokens = table.choices.get(shape_name(packed))
        if not by_tokens:
            raise WandappError(
                f"the table of kernels lacks {shape_name(packed)}; measure it with wandapp.routing.table_for"
            )
        self.bounds = sorted(by_tokens)
        names = [by_tokens[tokens].kernel for tokens in self.bounds]
        self.packed, blob = packed, None
        if any(name.startswith("cusparselt") for name in names):
            self.packed, blob = share_with_blob(packed)
        made = {name: kernel(name, self.packed, bias, blob) for name in set(names)}
        self.runs = [made[name] for name in names]

    def __call__(self, x: Tensor) -> Tensor:
        rows, cols = self.packed.shape
        tokens = x.view(-1, cols)
        if not len(tokens):
            return x.new_empty(*x.shape[:-1], rows)
        place = min(bisect_left(self.bounds, len(tokens)), len(self.bounds) - 1)
        return self.runs[place](tokens).view(*x.shape[:-1], rows)


def _time_us(run: Kernel, x: Tensor) -> float:
    """Median time of a call whose weight lies in memory, not in a cache."""
    if not x.is_cuda:
        starts = [(time.perf_counter(), run(x), time.perf_counter()) for _ in range(REPEATS)]
        return median(end - start for start, _, end in starts) * 1e6
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=x.device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        flush.zero_()  # takes longer than Python needs to launch what follows
        start.record()
        run(x)
        end.record()
    torch.cuda.synchronize(x.device)
    return median(start.elapsed_time(end) for start, end in events) * 1e3
