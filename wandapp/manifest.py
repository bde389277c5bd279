"""What the bits of a pruned checkpoint depend on, written down so that only the same run is ever continued."""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wandapp.config import PruneConfig
from wandapp.errors import WandappError, shorten
from wandapp.small_file import read_small

if TYPE_CHECKING:
    from wandapp.report import PruneReport
    from wandapp.store import ModelStore

MAX_BYTES = 16 << 20  # of a manifest; ours are a few kilobytes
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
_SAMPLED_PAGES, _PAGE_BYTES = 256, 4096
_PACKAGES = ("wandapp", "torch", "transformers")
# Options that do not change the result, or that the manifest covers in another way.
_FREE = {"model", "out", "overwrite", "device", "batch_size", "save_calibration", "stream", "activations"}


class SourceFile(BaseModel):
    """One weight file of the dense checkpoint (see `fingerprint`)."""

    model_config = _STRICT

    name: str
    bytes: int
    sample_sha256: str


class Manifest(BaseModel):
    """Everything that the result depends on.

    recipe    the options that can change it, by name
    threads   of a CPU's matrix products, whose sums they cut; a run that is continued takes the recorded number
    device    kind of processor: its instruction set, or the GPU's name
    """

    model_config = _STRICT

    format: Literal["wandapp-run"] = "wandapp-run"
    version: Literal[1] = 1
    blocks: int
    recipe: dict[str, Any]
    recipe_sha256: str
    source: list[SourceFile]
    calibration_sha256: str
    batch_size: int
    ranks: int
    threads: int = Field(ge=1, le=4096)
    device: str
    backend: str
    dtype: str
    versions: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """The manifest in a JSON file."""
        try:
            return cls.model_validate_json(read_small(path, MAX_BYTES))  # what is longer is no JSON then
        except (OSError, ValidationError) as error:
            reason = shorten(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else error.strerror
            raise WandappError(
                f"{path}: cannot be read ({reason}), so nobody knows which run it belongs to; delete {path.parents[1]} "
                "to start over"
            ) from None

    def require_same(self, earlier: "Manifest", partial: Path) -> None:
        """Raise, naming the first field in which the run that left `earlier` in `partial` differs from this one."""
        for name in type(self).model_fields:
            now, then = getattr(self, name), getattr(earlier, name)
            if now == then or name in ("recipe_sha256", "threads"):
                continue
            if isinstance(now, dict):
                key = next((key for key in {**then, **now} if now.get(key) != then.get(key)), None)
                if key is None:  # an option that this version added, and that is not given
                    continue
                name, now, then = f"{name}.{key}", now.get(key), then.get(key)
            elif name == "source":
                now, then = (
                    [(file.name, file.bytes, file.sample_sha256[:12]) for file in files] for files in (now, then)
                )
                now, then = next((a, b) for a, b in zip((*now, None), (*then, None), strict=False) if a != b)
            name, then, now = shorten(name), shorten(repr(then)), shorten(repr(now))
            raise WandappError(
                f"{partial}: the interrupted run cannot be continued, because {name} was {then} and is now {now}; make it "
                "the same again, or delete that folder to start over"
            )


def describe_run(config: PruneConfig, report: "PruneReport", store: "ModelStore", files: list[Path]) -> Manifest:
    """The manifest of a run of this process.

    report, store   the run's PruneReport and block store, before any block is pruned
    files           the dense checkpoint's weights
    """
    recipe = {key: value for key, value in config.model_dump(mode="json").items() if key not in _FREE}
    gpu = torch.cuda.get_device_name(store.device) if store.device.type == "cuda" else None
    return Manifest(
        blocks=len(store),
        recipe=recipe,
        recipe_sha256=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        source=[fingerprint(path) for path in files],
        calibration_sha256=report.calibration_sha256,
        batch_size=report.batch_size,
        ranks=report.ranks,
        threads=torch.get_num_threads(),
        device=gpu or f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        backend=os.environ.get("WANDAPP_BACKEND", "auto"),
        dtype=report.dtype,
        versions={package: importlib.metadata.version(package) for package in _PACKAGES},
    )


def fingerprint(path: Path) -> SourceFile:
    """Name, size and a hash of 256 pages of 4 KiB spread evenly over a file, its first and last among them.

    Not the whole file, which would cost one more pass over hundreds of gigabytes; not its time of change, which copying
    changes. Training or converting a checkpoint changes nearly every page; one weight changed by hand is not seen.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    last = max(size - _PAGE_BYTES, 0)
    with path.open("rb") as file:
        for page in range(_SAMPLED_PAGES):
            file.seek(last * page // (_SAMPLED_PAGES - 1))
            digest.update(file.read(_PAGE_BYTES))
    return SourceFile(name=path.name, bytes=size, sample_sha256=digest.hexdigest())
