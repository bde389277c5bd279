"""What a pruning run reports: result, cost against the machine's rate, and every warning."""

import importlib.metadata
import itertools
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandapp.distributed import Ranks
from wandapp.errors import WandappError
from wandapp.memory import peak_resident_bytes
from wandapp.methods.base import BlockRecord


class MachineRate:
    """The machine's matmul rate, sampled between blocks because it drifts; the sampling is timed apart."""

    SIZES = {"cpu": 1024, "cuda": 4096}  # of the square factors
    LEAST, LONGEST = (
        256,
        0.2,
    )  # smaller ones, down to this, where a product would take so many seconds (16 bits on a CPU)

    def __init__(self, device: torch.device, dtype: torch.dtype):
        size = self.SIZES[device.type]
        seconds = self._seconds(self.LEAST, device, dtype) if size > self.LEAST else 0.0
        while size > self.LEAST and seconds * (size / self.LEAST) ** 3 > self.LONGEST:
            size //= 2
        self.factors = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        self.flops, self.seconds, self.overhead = 0.0, 0.0, 0.0

    @staticmethod
    def _seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
        """Of one square product, roughly: it is not waited for on a GPU, which is fast at any type."""
        square = torch.ones(size, size, device=device, dtype=dtype)
        torch.mm(square, square)
        start = time.perf_counter()
        torch.mm(square, square)
        return time.perf_counter() - start

    def sample(self, repeats: int = 2) -> None:
        """Times `repeats` square products, after one that warms up."""
        start = time.perf_counter()
        left, right = self.factors
        torch.mm(left, right)
        _synchronize(left)
        timed = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        _synchronize(left)
        end = time.perf_counter()
        self.flops += repeats * 2.0 * len(left) ** 3
        self.seconds += end - timed
        self.overhead += end - start

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations per second, over all samples."""
        return self.flops / self.seconds / 1e9 if self.seconds else math.nan


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def peak_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: the device's allocations on a GPU, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


@dataclass(frozen=True)
class Progress:
    """One block done. seconds: since the start; message: what its record says in short; figures: the same as numbers."""

    block: int
    blocks: int
    name: str
    seconds: float
    eta_seconds: float
    peak_gib: float
    message: str
    figures: dict[str, float]


def block_figures(record: BlockRecord) -> dict[str, float]:
    """What trackers and wandapp/blocks.jsonl get of one block."""
    errors = list(record.layer_errors.values())
    before = {} if record.error_before is None else {"error_before": record.error_before}
    layers = {"mean_layer_error": sum(errors) / len(errors)} if errors else {}
    for name, place in (("kept_score_before", 0), ("kept_score", 1)) if record.kept_score else ():
        layers[name] = sum(kept[place] for kept in record.kept_score.values()) / len(record.kept_score)
    return {"error": record.error, **before, **layers, "sparsity": record.zeros / max(record.weights, 1)}


@dataclass
class PruneReport:
    """Result and cost of one run.

    sparsity          fraction of zeros in the pruned linear maps together
    seconds           wall time of recording and pruning, model loading and rate sampling excluded
    flops             by formula: linear maps and attention (whole square), forwards and backwards, Gram matrices, solver
    achieved_gflops   flops / seconds;  matmul_gflops: a dense square product's rate, measured during the run
    kept_dense        linear maps that --skip excludes, which have dense_weights weights
    allocation        sparsity that --allocate gave each block, by name; empty: all alike
    self_samples      how many of the samples the dense model wrote itself
    tuning            KL of the next token's distribution from the dense model's, nats per token of samples that were not trained
                      on, where there are more than eight: "divergence_before" and "divergence_after" end-to-end tuning; empty:
                      there was none
    ranks             processes that shared the samples: flops and rates are those of all, peak_gib the largest
    """

    method: str
    pattern: str
    samples: int
    seq_len: int
    calibration: str
    calibration_sha256: str
    device: str
    dtype: str
    batch_size: int
    ranks: int = 1
    self_samples: int = 0
    sparsity: float = math.nan
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    peak_gib: float = 0.0
    flops: float = 0.0
    achieved_gflops: float = math.nan
    matmul_gflops: float = math.nan
    linears: int = 0
    kept_dense: list[str] = field(default_factory=list)
    dense_weights: int = 0
    allocation: dict[str, float] = field(default_factory=dict)
    tuning: dict[str, float] = field(default_factory=dict)
    blocks: list[BlockRecord] = field(default_factory=list)
    zeros: int = 0
    weights: int = 0
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, flops: float, record: BlockRecord) -> None:
        """Takes in one finished block."""
        self.flops += flops
        self.blocks.append(record)
        self.linears += len(record.sparsity)
        self.warnings += record.warnings
        self.zeros += record.zeros
        self.weights += record.weights
        self.sparsity = self.zeros / max(self.weights, 1)

    def close(self, seconds: float, matmul_gflops: float, peak: float) -> None:
        """Brings the run's totals up to date."""
        self.seconds, self.matmul_gflops, self.peak_gib = seconds, matmul_gflops, peak
        self.achieved_gflops = self.flops / max(seconds, 1e-9) / 1e9

    def join(self, ranks: Ranks) -> None:
        """Takes in what the other ranks spent and warned of."""
        flops, rates, peaks, warnings = zip(
            *ranks.gather((self.flops, self.matmul_gflops, self.peak_gib, self.warnings)), strict=True
        )
        self.flops = sum(flops)
        self.close(self.seconds, sum(rates), max(peaks))
        self.warnings = list(dict.fromkeys(itertools.chain.from_iterable(warnings)))

    @classmethod
    def read(cls, path: Path) -> "PruneReport":
        """The report that a finished run wrote."""
        try:
            fields = json.loads(path.read_bytes())
            return cls(**fields | {"blocks": [BlockRecord(**block) for block in fields["blocks"]]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise WandappError(f"{path}: not the report of a run ({error}); prune again into another --out") from None

    def to_dict(self) -> dict:
        """Plain JSON types; NaN becomes null."""
        return json_ready(asdict(self))


def versions(*more: str) -> dict[str, str]:
    """Versions of what a figure depends on; `more` names further installed distributions."""
    names = ("wandapp", "torch", "transformers", *more)
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def json_ready(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON has not, as None."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
