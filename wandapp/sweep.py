"""Pruning jobs in bulk: one YAML file lists models x methods x patterns x seeds, and any other option as a list.

    out: runs                                      # checkpoints, logs and results.jsonl go here
    models: [smollm2]
    methods: [wanda, sparsegpt]
    patterns: ["2:4", "0.5"]
    seeds: [0, 1]
    calibration: pydoc                             # any option of wandapp prune, one value or a list of values
    exclude: [{method: sparsegpt, sparsity: "0.5"}]
    evaluate: {text: pydoc, seq_len: 512, windows: 20}

Each job is a process of its own, known by a hash of its resolved recipe. Its result is one line of OUT/results.jsonl, and
a job that has its line is finished. What several jobs need alike lies in OUT/shared, made by whichever needs it first.
sweep_run.py does the jobs.
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from wandapp.config import PruneConfig
from wandapp.errors import WandappError, nearest, shorten
from wandapp.options import Options
from wandapp.yaml_file import read_mapping

PLURALS = {"models": "model", "methods": "method", "patterns": "sparsity", "seeds": "seed"}
MAX_JOBS = 100_000
_DENSE = ("dtype", "device", "model")  # what the dense model's perplexity depends on
_NO_RESULT = {"out", "overwrite", "save_calibration", "gblm_cache"}  # what no result depends on
_NOT_HERE = {
    "overwrite": "a job that is done is left alone",
    "save_calibration": "jobs share their tokens already",
    "gblm_cache": "jobs share their gradients already",
}


class Evaluation(Options):
    """Perplexity after every job, and once of each dense model."""

    text: str = Field("wikitext2", description="wikitext2, c4, pydoc, or a file")
    seq_len: int = Field(2048, ge=2, description="tokens per window")
    windows: int | None = Field(None, ge=1, description="windows to use; all when left out")


class SweepOptions(Options):
    """The keys of a sweep file that are not options of `wandapp prune`."""

    out: str = Field(description="folder for checkpoints, logs and results.jsonl")
    exclude: tuple[dict[str, Any], ...] = Field((), description="jobs to leave out: mappings of option to value")
    evaluate: Evaluation | None = Field(None, description="text, seq_len and windows of a perplexity after each job")

    @field_validator("evaluate", mode="before")
    @classmethod
    def _own_message(cls, value: Any) -> Any:
        return Evaluation(**{str(k): v for k, v in value.items()}) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Job:
    """One process's work: prune by `recipe` and evaluate, or evaluate the dense model where `is_dense`.

    name    the varied options and the key, fit for a folder's name
    key     hash of what determines the result
    """

    name: str
    key: str
    recipe: PruneConfig
    evaluate: Evaluation | None
    is_dense: bool = False

    @property
    def kind(self) -> str:
        return "dense" if self.is_dense else "prune"

    @property
    def options(self) -> dict[str, Any]:
        """What determines the result, evaluation aside, in plain JSON types."""
        return self.recipe.model_dump(mode="json", include=set(_DENSE) if self.is_dense else None, exclude=_NO_RESULT)


class Sweep:
    """The jobs of a sweep file, in order: dense evaluations first, then every combination that is not excluded.

    raises  WandappError on an unknown key, a value that no job can have, or an exclusion that excludes nothing
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        mapping = read_mapping(path, "sweep")
        own = {name: mapping.pop(name) for name in list(mapping) if name in SweepOptions.model_fields}
        try:
            if "out" not in own:
                raise WandappError("a sweep needs out, a folder for its results; add out: runs")
            self.options = SweepOptions(**own)
            self.axes = _axes(mapping)
            self.jobs = self._jobs()
        except WandappError as error:
            raise WandappError(f"{path}: {error}") from None
        self.out = Path(self.options.out)
        self.results = Results(self.out / "results.jsonl")
        self.sharers = Counter(key for job in self.jobs if not job.is_dense for key in shared_keys(job.recipe))

    def _jobs(self) -> list[Job]:
        from wandapp import methods

        varied = [name for name, values in self.axes.items() if len(values) > 1]
        exclusions = [_normalised(exclusion) for exclusion in self.options.exclude]
        used: set[int] = set()
        jobs: dict[str, Job] = {}
        for values in itertools.product(*self.axes.values()):
            recipe = PruneConfig(**dict(zip(self.axes, values, strict=True))).resolved()
            methods.resolve(recipe.method)
            matching = [index for index, rule in enumerate(exclusions) if _matches(recipe, rule)]
            used.update(matching)
            if not matching:
                job = self._job("-".join(str(getattr(recipe, name)) for name in varied), recipe)
                jobs.setdefault(job.key, job)
        for index, exclusion in enumerate(self.options.exclude):
            if index not in used:
                raise WandappError(f"exclude: {shorten(exclusion)} matches no job; correct it or leave it out")
        if not jobs:
            raise WandappError("no job is left; exclude fewer")
        return self._dense_jobs([job.recipe for job in jobs.values()]) + list(jobs.values())

    def _dense_jobs(self, recipes: list[PruneConfig]) -> list[Job]:
        """The dense model's perplexity does not depend on how it is pruned: once for each model, type and device."""
        if self.options.evaluate is None:
            return []
        models = sorted({tuple(getattr(recipe, name) for name in _DENSE) for recipe in recipes})
        recipes = [PruneConfig(**dict(zip(_DENSE, values, strict=True))) for values in models]
        return [self._job(f"dense-{Path(str(recipe.model)).name}", recipe, is_dense=True) for recipe in recipes]

    def _job(self, words: str, recipe: PruneConfig, is_dense: bool = False) -> Job:
        job = Job("", "", recipe, self.options.evaluate, is_dense)
        key = _hash({"kind": job.kind, "recipe": job.options, "evaluate": job.evaluate and job.evaluate.model_dump()})
        return replace(job, name=_slug(f"{words}-{key[:8]}"), key=key)

    def folder(self, job: Job) -> Path:
        """Where the job's checkpoint goes."""
        return self.out / job.name

    def log(self, job: Job) -> Path:
        """Where the job's process writes what it says."""
        return self.out / "logs" / f"{job.name}.log"

    def job(self, index: int) -> Job:
        """The job of that index."""
        if not 0 <= index < len(self.jobs):
            raise WandappError(f"{self.path}: job {index} does not exist; there are {len(self.jobs)}, counted from 0")
        return self.jobs[index]


def _axes(mapping: dict[str, Any]) -> dict[str, list]:
    """Option of `wandapp prune` -> its values."""
    axes: dict[str, list] = {}
    for key, value in mapping.items():
        name = PLURALS.get(key, key)
        if name in _NOT_HERE:
            raise WandappError(f"{name} cannot be set in a sweep, {_NOT_HERE[name]}; leave it out")
        if name not in PruneConfig.model_fields:
            valid = [*SweepOptions.model_fields, *PLURALS, *(set(PruneConfig.model_fields) - _NOT_HERE.keys())]
            raise WandappError(f"key {shorten(key)!r} does not exist; {nearest(key, valid)}")
        if name in axes:
            raise WandappError(f"{key}: {name} is given twice, once under its other name; keep one of them")
        is_axis = isinstance(value, list) and (name != "skip" or all(isinstance(one, list) for one in value))
        axes[name] = value if is_axis else [value]
        if not axes[name]:
            raise WandappError(f"{key} is an empty list; give at least one value")
    if "model" not in axes or None in axes["model"]:
        raise WandappError("a sweep needs models; add models: [smollm2], for example")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MAX_JOBS:
        raise WandappError(f"{count} jobs, a sweep has at most {MAX_JOBS}; split the file")
    return axes


def _normalised(exclusion: dict[str, Any]) -> dict[str, list]:
    """Option -> the values to exclude, as PruneConfig spells them."""
    rule = {}
    for key, value in exclusion.items():
        name = PLURALS.get(str(key), str(key))
        values = value if isinstance(value, list) and name != "skip" else [value]
        rule[name] = [getattr(PruneConfig(**{name: one}), name) for one in values]
    if not rule:
        raise WandappError("exclude: an empty mapping excludes every job; name an option and a value")
    return rule


def _matches(recipe: PruneConfig, rule: dict[str, list]) -> bool:
    return all(getattr(recipe, name) in values for name, values in rule.items())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _slug(text: str) -> str:
    """Fit for a file name: sw/a:b -> a-b."""
    return re.sub(r"[^\w.+=-]+", "-", text.replace(":", "of")).strip("-.")[-120:]


def shared_keys(recipe: PruneConfig) -> list[str]:
    """Hashes of what a job may share: its calibration tokens, and for gblm the dense model's gradients on them."""
    key = calibration_key(recipe)
    return [key, f"gradients {key}"] if recipe.method.split("+")[0] == "gblm" else [key]


def calibration_key(recipe: PruneConfig) -> str:
    """Hash of what determines a job's calibration tokens; "self" is written by the model, in its type, at a temperature."""
    names = ("model", "calibration", "samples", "seq_len", "seed", "text_field")
    options = {name: getattr(recipe, name) for name in names}
    if recipe.calibration == "self":
        options |= {"dtype": recipe.dtype, "temperature": recipe.resolved().self_temperature}
    return _hash(options)


class Results:
    """The lines of a JSONL file that many processes append to. A line is whole or, after a crash, no line at all."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Adds one line, under a lock, flushed to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file, locked(file):
            end = file.seek(0, os.SEEK_END)
            torn = end and os.pread(file.fileno(), 1, end - 1) != b"\n"  # a process died while it wrote
            file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[dict[str, dict[str, Any]], int]:
        """(the last row of each key, number of lines that are no row)."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}, 0
        except OSError as error:
            raise WandappError(f"{self.path}: cannot be read ({error.strerror}); check the path") from None
        rows, unreadable = {}, 0
        for line in filter(None, lines):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, TypeError, LookupError, RecursionError):
                unreadable += 1
        return rows, unreadable


def state(job: Job, rows: dict[str, dict[str, Any]]) -> str:
    """ "done", "failed" or "pending", as the results say."""
    return rows.get(job.key, {}).get("status", "pending")


@contextmanager
def locked(file: Any) -> Iterator[None]:
    """Holds an exclusive lock on an open file; it dies with the process."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
