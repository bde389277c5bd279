"""OUT.partial while a run fills it: which run it is, and each pruned block as soon as it is done.

    OUT.partial/wandapp/run.json                    what the result depends on (`Manifest`)
    OUT.partial/wandapp/recipe.yaml                 with it `wandapp prune --config ... --resume` needs nothing else
    OUT.partial/model-00003-of-00033.safetensors    block 2, pruned; its report is in the file's metadata

A block's file appears complete or not at all, so a run may be killed at any moment: the next one reads what is there, runs
the finished blocks forward and goes on with the first that is missing. All that is random is seeded per block, so the
result is the same, bit for bit.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from wandapp.config import PruneConfig
from wandapp.distributed import Ranks, program
from wandapp.errors import Interrupted, WandappError
from wandapp.manifest import Manifest
from wandapp.methods.base import BlockRecord
from wandapp.models import require_finite
from wandapp.output import (
    MANIFEST,
    check_output,
    clear,
    discard,
    locked,
    partial_of,
    put_in_place,
    refuse_unfinished,
    tidy,
    write_files,
)
from wandapp.shards import ShardReader, disk_tensor, shard_metadata, write_index, write_shard
from wandapp.weight_files import refuse_special_files

_RECORD = TypeAdapter(BlockRecord)
RECIPE, _SCRATCH = "wandapp/recipe.yaml", "wandapp/scratch"


class RunFolder:
    """The output of one run of `config`. A context: what left it early leaves finished blocks in place, else nothing.

    resume   go on with what an earlier run left; else an earlier run's finished blocks are a reason to refuse
    ranks    the processes of the run, of which the first writes
    """

    def __init__(self, config: PruneConfig, *, resume: bool = False, ranks: Ranks | None = None):
        self.config, self.resume, self.ranks = config, resume, ranks or Ranks()
        self.out, self.partial = Path(config.target), partial_of(config.target)
        self.blocks = self.done = 0
        self.io_seconds = 0.0
        self._lock = ExitStack()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="wandapp-write")
        self._writing: Future | None = None

    def __enter__(self) -> "RunFolder":
        self.ranks.first(self._occupy)
        return self

    def _occupy(self) -> None:
        check_output(self.out, self.config.overwrite, self.config.model)
        if not self.resume:
            refuse_unfinished(self.out)
        with self.disk("cannot be made"):
            self._lock.enter_context(locked(self.partial, self.out))
            if not self.resume:
                clear(self.partial)
            refuse_special_files(self.partial, "delete that folder to start over")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        if self.ranks.is_first and self.partial.is_dir() and not self._count():
            discard(self.partial)
        self._lock.close()
        if kind is Interrupted:
            error.args = (self._how_to_go_on(f"{error}; "),)
        elif isinstance(error, WandappError) and self.ranks.is_first and str(self.partial) not in str(error):
            if done := self._count():
                error.args = (f"{error}; finished blocks kept in {self.partial} for --resume: {done}",)

    def begin(self, manifest: Manifest) -> int:
        """Threads to work with, once it is known how many blocks an earlier run of the same manifest finished (`done`)."""
        self.blocks = manifest.blocks
        self.done, threads = self.ranks.first(lambda: self._compare(manifest))
        return threads

    def _compare(self, manifest: Manifest) -> tuple[int, int]:
        if done := self._count():
            earlier = Manifest.read(self.partial / MANIFEST)
            manifest.require_same(earlier, self.partial)
            return done, earlier.threads
        with self.disk("cannot be written"):
            text = manifest.model_dump_json(indent=1) + "\n"
            write_files(self.partial, {MANIFEST: text, RECIPE: self.config.dump_yaml()})
        return 0, manifest.threads

    def finished(self, index: int) -> BlockRecord | None:
        """The report of a block that an earlier run finished."""
        if index >= self.done:
            return None
        try:
            return _RECORD.validate_python(json.loads(shard_metadata(self._path(index))["block"]))
        except WandappError:
            raise
        except (KeyError, ValueError):  # pydantic's among them
            raise WandappError(
                f"{self._path(index)}: not written by wandapp; delete it to prune its block again"
            ) from None

    def read(self, index: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """A finished block's tensors, under the checkpoint's names.

        like    tensors of the same names, shapes and types, such as the dense block's
        raises  WandappError where the file no longer holds such tensors, or one that is NaN or Inf
        """
        path = self._path(index)
        reader = ShardReader([path])
        kept = {name: (stored.shape, stored.dtype) for name, stored in reader.tensors.items()}
        if kept != {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in like.items()}:
            raise WandappError(f"{path}: not the tensors that the run kept there; delete it to prune its block again")
        tensors = {name: reader.read(name) for name in kept}
        require_finite(path, tensors, "delete it to prune its block again")
        return tensors

    def keep(self, index: int, tensors: Callable[[], dict[str, Tensor]], record: BlockRecord) -> None:
        """Begins to write a pruned block, whose tensors must stay as they are until `wait` returns."""
        if self.ranks.is_first:
            timeless = replace(record, permute_seconds=0.0)  # two runs write the same bytes
            metadata = {"format": "pt", "block": json.dumps(asdict(timeless))}
            self._writing = self._writer.submit(write_shard, self._path(index), tensors(), metadata)

    def wait(self) -> None:
        """Returns when the block last kept is safe on the disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            start = time.perf_counter()
            with self.disk("could not be written"):
                writing.result()
            self.io_seconds += time.perf_counter() - start

    def disk_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros on the disk in this folder; room for them is taken at once."""
        folder = self.partial / "wandapp" if self.ranks.is_first else None
        with self.disk("has no room for the activations"):
            return disk_tensor(folder, shape, dtype)

    def scratch(self, name: str) -> Path:
        """A folder for what only this run needs."""
        return self.partial / _SCRATCH / name

    def finish(self, outer: dict[str, Tensor], save_config: Callable[[Path], None], files: dict[str, str]) -> None:
        """Completes the checkpoint with what is outside the blocks and renames the folder to OUT."""
        with self.disk("could not be written"):
            write_shard(self._path(self.blocks), outer, {"format": "pt"})
            save_config(self.partial)
            write_index(self.partial, [self._path(index) for index in range(self.blocks + 1)])
            write_files(self.partial, files)
            for leftover in self.partial.glob("*.unfinished"):
                leftover.unlink()
            shutil.rmtree(self.partial / _SCRATCH, ignore_errors=True)
            put_in_place(self.partial, self.out)

    def is_complete(self) -> bool:
        """Whether OUT is what a run of this recipe made, and nothing is left to do."""
        recipe = self.out / RECIPE
        if self.partial.exists() or not (self.out / MANIFEST).is_file() or not recipe.is_file():
            return False
        if _what_counts(PruneConfig.from_yaml(recipe)) != _what_counts(self.config):
            return False
        tidy(self.out)
        return True

    def _path(self, index: int) -> Path:
        return self.partial / f"model-{index + 1:05}-of-{self.blocks + 1:05}.safetensors"

    def _count(self) -> int:
        """Finished blocks without a gap from the first on."""
        names = {path.name.split("-of-")[0] for path in self.partial.glob("model-*-of-*.safetensors")}
        count = 0
        while f"model-{count + 1:05}" in names:
            count += 1
        return min(count, self.blocks) if self.blocks else count

    def _how_to_go_on(self, what: str) -> str:
        done = self._count()
        if not self.partial.exists() and (self.out / MANIFEST).exists():
            return f"{what}{self.out} is complete"
        if not done:
            return f"{what}no block was finished, so nothing was kept"
        of = f" of {self.blocks}" if self.blocks else ""
        return (
            f"{what}{done}{of} blocks are finished and kept; continue with: "
            f"{program()} prune --config {self.partial / RECIPE} --resume"
        )

    @contextmanager
    def disk(self, problem: str) -> Iterator[None]:
        """Turns what the disk raises into one sentence that says what was kept."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise WandappError(self._how_to_go_on(f"{self.partial}: {problem} ({reason}); ")) from error


def earlier_recipe(target: str) -> PruneConfig | None:
    """What an earlier run into this folder, finished or not, noted of its options; None where nothing of it can be read."""
    for folder in (partial_of(target), Path(target)):
        if (folder / RECIPE).is_file():
            with suppress(WandappError):
                return PruneConfig.from_yaml(folder / RECIPE)
    return None


def _what_counts(config: PruneConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"overwrite", "stream", "activations", "save_calibration"})
