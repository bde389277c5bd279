"""What `wandapp report` reads: output folders of prune, pack and recover, a sweep's results.jsonl, saved --json output.

A run is one checkpoint with all that is known about it. A JSON file adds to the run whose folder it names; where no
given folder has that name it makes a run of its own.
"""

import errno
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandapp.config import PruneConfig
from wandapp.errors import WandappError

Json = dict[str, Any]


@dataclass
class Run:
    """One checkpoint.

    prune, recover   their reports; empty where there is none
    perplexities     results of eval, newest last; tasks likewise
    bench            figures of `bench inference` by form, "dense" and "sparse", or None
    stored_bytes     of its safetensors files, or None where its folder is not known
    failure          why a job of a sweep came to nothing
    """

    name: str
    folder: Path | None = None
    recipe: Json = field(default_factory=dict)
    prune: Json = field(default_factory=dict)
    recover: Json = field(default_factory=dict)
    losses: list[Json] = field(default_factory=list)
    perplexities: list[Json] = field(default_factory=list)
    tasks: list[Json] = field(default_factory=list)
    bench: Json | None = None
    kernels: Json | None = None
    stored_bytes: int | None = None
    is_packed: bool = False
    is_dense: bool = False
    failure: str | None = None

    @property
    def method(self) -> str:
        """What was done to the weights, in short."""
        if self.is_dense:
            return "dense"
        pruned = self.prune["method"] if self.prune else self.recipe.get("method", "")
        return " + ".join(filter(None, [pruned, "recover" if self.recover else "", "packed" if self.is_packed else ""]))

    @property
    def pattern(self) -> str:
        known = self.prune or self.recover
        return "" if self.is_dense else known.get("pattern", "") or self.recipe.get("sparsity", "")

    @property
    def model(self) -> str:
        """The dense model it comes from."""
        return str(self.recipe.get("model") or "")

    def perplexity(self, text: tuple) -> float | None:
        """The newest figure on `text`, a key of `text_key`."""
        values = [result["perplexity"] for result in self.perplexities if text_key(result) == text]
        return values[-1] if values else None

    @property
    def tokens_per_s(self) -> float | None:
        """At the smallest batch that was measured."""
        if not self.bench:
            return None
        rates = {
            int(k.rpartition("_")[2]): v for k, v in self.bench[self._form].items() if k.startswith("tokens_per_s")
        }
        return rates[min(rates)] if rates else None

    @property
    def _form(self) -> str:
        return "dense" if self.is_dense else "sparse"

    @property
    def warnings(self) -> list[str]:
        """What the run warned of, or why it failed."""
        return list(self.prune.get("warnings", [])) + ([f"failed: {self.failure}"] if self.failure else [])


def text_key(result: Json) -> tuple:
    """What must agree before two perplexities may be compared: text, its hash, seq_len, windows."""
    return tuple(result.get(name) for name in ("text", "split", "text_sha256", "seq_len", "windows"))


def short_text(key: tuple) -> str:
    """The text's name without its description: "pydoc", a file's name."""
    return Path(str(key[0]).partition(" (")[0]).name


def read_runs(places: Sequence[str | Path]) -> list[Run]:
    """The runs in folders and JSON files, dense models first.

    raises  WandappError on a folder or file that holds no result of wandapp
    """
    folders = [_folder_run(Path(place)) for place in places if Path(place).is_dir()]
    runs = {_key(run.folder): run for run in folders}
    for place in map(Path, places):
        if not place.is_dir():
            for result in _json_objects(place):
                _add(runs, result, place)
    dense = {run.model for run in runs.values() if run.model}
    for run in runs.values():
        run.is_dense = not run.prune and not run.recover and run.name in dense
        if run.is_dense and run.stored_bytes is None:
            run.stored_bytes = _weight_bytes(Path(run.name))
    _name_apart(runs.values())
    return sorted(runs.values(), key=lambda run: not run.is_dense)


def _key(folder: Path | None) -> str:
    return str(folder.resolve()) if folder else ""


def _folder_run(folder: Path) -> Run:
    home = folder / "wandapp"
    run = Run(folder.name, folder, recipe=_recipe(home / "recipe.yaml"))
    run.prune, run.recover = _optional(home / "report.json"), _optional(home / "recover.json")
    run.losses, run.is_packed = _lines(home / "recover-loss.jsonl"), (home / "packed.json").is_file()
    for result in _lines(home / "eval.jsonl"):
        _add_evaluation(run, result)
    if not (run.recipe or run.prune or run.recover or run.is_packed):
        raise WandappError(
            f"{folder}: no wandapp/report.json in it; give a folder that wandapp prune, pack or recover wrote"
        )
    run.stored_bytes = _weight_bytes(folder)
    return run


def _weight_bytes(folder: Path) -> int | None:
    """Of its safetensors files; None where there are none, as in the folder of a name on the hub."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def _recipe(path: Path) -> Json:
    return PruneConfig.from_yaml(path).model_dump(mode="json") if path.is_file() else {}


def _optional(path: Path) -> Json:
    return _one_object(path.read_text(encoding="utf-8"), path) if path.is_file() else {}


def _lines(path: Path) -> list[Json]:
    return [_one_object(line, path) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _json_objects(path: Path) -> list[Json]:
    """One JSON object, or one per line; lines before it that are no JSON (a log) are passed over."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "a pipe or a device")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WandappError(f"{path}: neither a folder nor a JSON file that can be read ({reason})") from None
    try:
        return [_one_object(text, path)]
    except WandappError:
        lines = [line for line in text.splitlines() if line.startswith("{")]
        if not lines:
            raise
        return [_one_object(line, path) for line in lines]


def _one_object(text: str, path: Path) -> Json:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise WandappError(f"{path}: no JSON ({error}); save it with: wandapp ... --json > {path.name}") from None
    if not isinstance(found, dict):
        raise WandappError(f"{path}: a JSON object was expected, got {type(found).__name__}")
    return found


def _add(runs: dict[str, Run], result: Json, place: Path) -> None:
    """Puts one command's result where it belongs."""
    if "copy_gb_s" in result and isinstance(result.get("rows"), list):
        runs[str(place)] = Run(place.stem, kernels=result)
        return
    if {"kind", "recipe", "status"} <= result.keys():
        _add_job(runs, result, place.parent)
        return
    subject = result.get("out") or result.get("model")
    if subject is None:
        raise WandappError(f"{place}: no result of wandapp's prune, recover, eval or bench; save one with --json")
    run = runs.setdefault(_subject_key(runs, str(subject)), Run(str(subject)))
    if "perplexities" in result or "perplexity" in result:
        _add_evaluation(run, result)
        for baseline in filter(None, [result.get("dense")]):
            _add(runs, baseline, place)
    elif isinstance(result.get("rows"), dict):
        run.bench = result["rows"]
    elif "blocks" in result:
        run.prune, run.recipe = result, run.recipe or {"model": result.get("model")}
    elif "before" in result and "after" in result:
        run.recover = result
    elif "packed_bytes" in result:
        run.stored_bytes, run.is_packed = run.stored_bytes or result["packed_bytes"], True
    else:
        raise WandappError(f"{place}: no result of wandapp's prune, recover, eval or bench; save one with --json")


def _add_job(runs: dict[str, Run], row: Json, home: Path) -> None:
    """One line of a sweep's results: the job's folder where it is still there, and its evaluation."""
    folder, evaluation = home / row["name"], row.get("evaluation")
    if row.get("report") is None:  # the dense model, or a job that failed
        subject = str(row["recipe"].get("model")) if row["status"] == "done" else row["name"]
        run = runs.setdefault(subject, Run(subject))
        run.failure = row.get("error")
    elif _key(folder) in runs:
        run = runs[_key(folder)]
    else:
        run = _folder_run(folder) if folder.is_dir() else Run(row["name"], recipe=row["recipe"])
        run.prune = run.prune or {"blocks": [], **row["report"]}
        runs[_key(folder)] = run
    if evaluation:
        _add_evaluation(run, evaluation)


def _subject_key(runs: dict[str, Run], subject: str) -> str:
    """The run that a result speaks of: the same folder, else a folder of that name, else a new one."""
    if str(Path(subject).resolve()) in runs:
        return str(Path(subject).resolve())
    same_name = [key for key, run in runs.items() if run.folder and run.folder.name == Path(subject).name]
    return same_name[0] if len(same_name) == 1 else subject


def _add_evaluation(run: Run, result: Json) -> None:
    run.perplexities += result.get("perplexities") or ([result] if "perplexity" in result else [])
    run.tasks += (result.get("tasks") or {}).get("tasks", [])


def _name_apart(runs: Iterable[Run]) -> None:
    """Short names where they tell the runs apart, whole paths where they do not."""
    runs = list(runs)
    names = [Path(run.name).name for run in runs]
    for run, name in zip(runs, names, strict=True):
        run.name = name if names.count(name) == 1 and name else str(run.folder or run.name)
