"""Zero-shot and few-shot accuracy through EleutherAI's lm-eval (the extra wandapp[eval]), on a loaded model, dense or packed.

The papers' task lists are presets. A path to a task's YAML file, or to a folder of them, works without a network where
its data are local.
"""

import dataclasses
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn

from wandapp.corpus import first_line
from wandapp.errors import WandappError, nearest

SEED = 1234  # of few-shot examples, as in lm-eval
BOOTSTRAPS = 1000  # for standard errors that have no closed form, such as f1's
# What lm-eval raises on a YAML whose keys do not fit together; it checks few of them.
_DEFINITION_ERRORS = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError, TemplateError)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Names of lm-eval's tasks; num_fewshot None: as each task says, else 0."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None


PRESETS = {
    # arXiv:2306.11695, zero-shot
    "wanda7": Preset(("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"), 0),
    # arXiv:2503.04992, zero-shot
    "wandapp9": Preset(
        ("wic", "mrpc", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "boolq", "rte", "mmlu"), 0
    ),
    "mmlu5": Preset(("mmlu",), 5),
}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task. metrics: accuracy and the like, each beside its standard error NAME_stderr where lm-eval gives one."""

    task: str
    metrics: dict[str, float]
    num_fewshot: int | None
    samples: int | None
    version: str | None
    task_sha256: str | None  # of the prompts and targets


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """All tasks, their mean accuracy (`acc`, as the papers average), and what the figures depend on."""

    tasks: list[TaskResult]
    mean_accuracy: float | None
    limit: float | None
    tokenizer: str
    dtype: str
    seed: int = SEED

    def to_dict(self) -> dict:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskResults:
    """Results of `model` on lm-eval's tasks.

    names        presets, lm-eval's tasks or groups, .yaml files, folders of them
    num_fewshot  examples in each prompt; None: those of the preset that names the task, or as the task says
    limit        documents per task (1 and above), or their share; None: all
    on_progress  called with (requests done, requests) of the tasks in work
    raises       WandappError where a task does not exist, its data cannot be had, or it is asked for in two ways
    """
    if limit is not None and limit <= 0:
        raise WandappError(
            f"limit must be above 0, got {limit:g}: a number of documents per task, or their share below 1"
        )
    if tokenizer is None:
        raise WandappError("tasks need a tokenizer, and this checkpoint has none; copy the base model's beside it")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names_by_shots, local = _expand(names, num_fewshot)
    names = [name for group in names_by_shots.values() for name in group]
    with nullcontext() if on_progress is None else redirect_stderr(StringIO()):  # its own bars
        loaded = _load(names_by_shots, local)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    random.seed(SEED), numpy.random.seed(SEED), torch.manual_seed(SEED)
    lm = _WatchedModel(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    lm.on_progress = on_progress
    with _resampling_here(), nullcontext() if on_progress is None else redirect_stderr(StringIO()):
        try:
            raw = evaluate(lm, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS)
        except TemplateError as error:
            raise WandappError(
                f"tasks {', '.join(names)}: a document does not fit the templates ({first_line(error)}); check the doc_to_ "
                "lines of the task's YAML"
            ) from error
    results = [_result(name, raw) for name in raw["results"]]
    wanted = [result for result in results if result.task in names and "acc" in result.metrics]
    return TaskResults(
        results,
        sum(result.metrics["acc"] for result in wanted) / len(wanted) if wanted else None,
        limit,
        tokenizer.name_or_path or type(tokenizer).__name__,
        str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
    )


@contextmanager
def _resampling_here() -> Iterator[None]:
    """Lets lm-eval resample for its standard errors in this process, instead of in copies of it, and not tell on stdout."""
    key = "DISABLE_MULTIPROC"
    earlier = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        if earlier is None:
            del os.environ[key]
        else:
            os.environ[key] = earlier


class _WatchedModel(HFLM):
    """lm-eval's wrapper of a transformers model, which reports its progress instead of drawing a bar."""

    on_progress: Callable[[int, int], None] | None = None

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._done, self._requests = 0, len(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self._done = min(self._done + len(inps), self._requests)
        if self.on_progress:
            self.on_progress(self._done, self._requests)
        return logits


def _expand(names: Sequence[str], num_fewshot: int | None) -> tuple[dict[int | None, list[str]], dict[str, str]]:
    """(task names by examples per prompt, folder of each local task) that `names` stand for."""
    expanded: dict[int | None, list[str]] = {}
    local: dict[str, str] = {}
    for name in names:
        path, found, shots = Path(name), [name], num_fewshot
        if name in PRESETS:
            found = list(PRESETS[name].tasks)
            shots = PRESETS[name].num_fewshot if num_fewshot is None else num_fewshot
        elif path.is_dir() or path.suffix in (".yaml", ".yml"):
            found = _local_tasks(path)
            local |= dict.fromkeys(found, str(path if path.is_dir() else path.parent))
        group = expanded.setdefault(shots, [])
        group += [task for task in dict.fromkeys(found) if task not in group]
    return expanded, local


def _local_tasks(path: Path) -> list[str]:
    """Names of the tasks in a file or a folder."""
    if not path.exists():
        raise WandappError(f"{path}: no such task file; check the path")
    folder = path if path.is_dir() else path.parent
    with _definition_errors(path):
        index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    found = [
        name for name, entry in index.items() if path.is_dir() or Path(entry.yaml_path).resolve() == path.resolve()
    ]
    if not found:
        raise WandappError(f"{path}: holds no task of lm-eval; a task's YAML has the key 'task' with its name")
    return found


def _load(names_by_shots: dict[int | None, list[str]], local: dict[str, str]) -> dict:
    """lm-eval's tasks with their data. Its own thousands of task files are read only where one of them is wanted."""
    names = [name for group in names_by_shots.values() for name in group]
    folders = list(dict.fromkeys(local.values()))
    manager = TaskManager(include_path=folders or None, include_defaults=any(name not in local for name in names))
    for name in names:
        if name not in manager.task_index:
            raise WandappError(
                f"task {name!r} is neither a preset ({', '.join(PRESETS)}), a YAML file, nor one of lm-eval's; "
                f"{nearest(name, (*PRESETS, *manager.task_index), limit=8)}"
            )
    try:
        with _definition_errors(f"tasks {', '.join(names)}"):
            return _joined({shots: manager.load(group) for shots, group in names_by_shots.items()})
    except (OSError, DatasetsError) as error:  # no network, no such data set or file
        raise WandappError(
            f"tasks {', '.join(names)}: their data cannot be had ({first_line(error)}); connect once so that they are "
            "cached, or give a task YAML whose data are local"
        ) from error


def _joined(loaded: dict[int | None, dict]) -> dict:
    """What lm-eval loaded by examples per prompt as one, each task with its number set."""
    joined: dict[str, dict] = {}
    for shots, parts in loaded.items():
        for name, task in parts["tasks"].items():
            if shots is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=shots or 0)
            other = joined.get("tasks", {}).get(name, task)
            if other.get_config("num_fewshot") != task.get_config("num_fewshot"):
                raise WandappError(
                    f"task {name!r} is asked for with {other.get_config('num_fewshot')} and with "
                    f"{task.get_config('num_fewshot')} examples in the prompt; evaluate it twice, or give --num-fewshot"
                )
        for kind, entries in parts.items():
            joined[kind] = joined.get(kind, {}) | entries
    return joined


@contextmanager
def _definition_errors(what: object) -> Iterator[None]:
    try:
        yield
    except (OSError, DatasetsError):  # of data, not of the definition
        raise
    except _DEFINITION_ERRORS as error:
        raise WandappError(
            f"{what}: lm-eval cannot use the definition ({first_line(error)}); check the task's YAML"
        ) from error


def _result(name: str, raw: dict) -> TaskResult:
    metrics = {
        key.partition(",")[0]: float(value)
        for key, value in raw["results"][name].items()
        if isinstance(value, int | float) and "," in key
    }
    version = raw.get("versions", {}).get(name)
    return TaskResult(
        name,
        metrics,
        raw.get("n-shot", {}).get(name),
        raw.get("n-samples", {}).get(name, {}).get("effective"),
        None if version is None else str(version),
        _hash_of(raw.get("samples", {}).get(name)),
    )


def _hash_of(logged: list[dict] | None) -> str | None:
    """One hash of all documents', prompts' and targets' hashes, in order."""
    parts = [str(row.get(key)) for row in logged or () for key in ("doc_hash", "prompt_hash", "target_hash")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else None
