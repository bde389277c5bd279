"""What `wandapp eval` measures of one checkpoint or two: perplexities, tasks, and everything the figures depend on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandapp.card import refresh_card
from wandapp.config import PruneConfig
from wandapp.errors import WandappError
from wandapp.evaluate import perplexity
from wandapp.inference import fallback_notes, load_either
from wandapp.report import json_ready, versions


@dataclass(frozen=True)
class EvalOptions:
    """What to measure. texts and tasks: any number of each; the rest as in `perplexity` and `evaluate_tasks`."""

    texts: tuple[str, ...] = ("wikitext2",)
    seq_len: int | None = None
    windows: int | None = None
    batch_size: int | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    dtype: str = "auto"
    device: str = "auto"
    require_sparse: bool = False


def evaluate_checkpoint(
    reference: str,
    options: EvalOptions,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Figures of one checkpoint, dense or packed, as JSON types: model, perplexities, tasks, versions.

    raises  WandappError on an unusable model, text or task
    """
    if options.tasks:
        evaluate_tasks = _lm_eval()  # before the model is loaded
    on_note(f"loading {reference}")
    model, tokenizer = load_either(
        reference, dtype=options.dtype, device=options.device, require_sparse=options.require_sparse
    )
    for note in fallback_notes(model):
        on_note(note)
    found: dict[str, Any] = {"model": str(reference), "perplexities": [], "tasks": None}
    for text in options.texts:
        on_note(f"perplexity on {text}")
        settings: dict[str, Any] = {
            "seq_len": options.seq_len,
            "windows": options.windows,
            "batch_size": options.batch_size,
        }
        result = perplexity(model, tokenizer, text=text, on_progress=on_progress, **settings)
        found["perplexities"].append(result.to_dict())
    if options.tasks:
        on_note(f"tasks {', '.join(options.tasks)}")
        settings = {"num_fewshot": options.num_fewshot, "limit": options.limit, "batch_size": options.batch_size or 1}
        results = evaluate_tasks(model, tokenizer, options.tasks, on_progress=on_progress, **settings)
        found["tasks"] = results.to_dict()
    found["versions"] = versions(*(["lm-eval"] if options.tasks else []))
    return json_ready(found)


def _lm_eval() -> Callable:
    try:
        from wandapp.tasks import evaluate_tasks
    except ImportError as error:
        raise WandappError(f"--tasks needs {error.name}; install it with: pip install 'wandapp[eval]'") from None
    return evaluate_tasks


def base_of(reference: str) -> str:
    """The dense model that a checkpoint was pruned from, as its recipe names it."""
    recipe = Path(reference) / "wandapp" / "recipe.yaml"
    model = PruneConfig.from_yaml(recipe).model if recipe.is_file() else None
    if model is None:
        raise WandappError(f"{reference}: no wandapp/recipe.yaml names its dense model; give it with --dense-model")
    return model


def check_keeping(folder: str | Path) -> None:
    """Raise where `keep_figures` could not keep any."""
    if not (Path(folder) / "wandapp" / "recipe.yaml").is_file():
        raise WandappError(f"{folder}: --save keeps figures beside a checkpoint that wandapp wrote, and this is none")


def keep_figures(folder: str | Path, figures: dict[str, Any]) -> None:
    """Appends the figures to FOLDER/wandapp/eval.jsonl and writes the model card anew with them."""
    folder = Path(folder)
    check_keeping(folder)
    with (folder / "wandapp" / "eval.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
    refresh_card(folder)
