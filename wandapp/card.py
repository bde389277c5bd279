"""The model card of a checkpoint that wandapp wrote: metadata the hub understands, and what a reader should know."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from wandapp.config import PruneConfig
from wandapp.weight_files import is_packed

PACKED_NOTE = (
    "\n> This folder holds the packed form, which `wandapp.load_sparse` and `wandapp generate` read; "
    "`wandapp unpack` restores the dense one.\n"
)
_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def model_card(
    recipe: PruneConfig, report: dict, *, recovered: dict | None = None, measured: Sequence[dict] = ()
) -> str:
    """Markdown with YAML front matter.

    report     wandapp/report.json, or {} where there is none
    recovered  wandapp/recover.json of a checkpoint that was trained after pruning
    measured   perplexities of this checkpoint (PerplexityResult.to_dict), beside those in `recovered`
    """
    measured = [*measured, *(recovered or {}).get("after", {}).values()]
    name = f"{Path(recipe.model or 'model').name}, pruned to {recipe.sparsity}" + (" and trained" if recovered else "")
    data = ModelCardData(
        base_model=base_model(recipe.model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["wandapp", "pruned", "sparse", recipe.sparsity, recipe.method],
        model_name=name if measured else None,
        eval_results=[_eval_result(result) for result in measured] or None,
        sparsity=recipe.sparsity,
        pruning_method=recipe.method,
        calibration=report.get("calibration"),
    )
    sections = [f"---\n{data}\n---\n# {name}", _what(recipe, report), _facts(recipe, report), _training(recovered)]
    sections += [_perplexities(measured, (recovered or {}).get("before", {})), _LOADING]
    return "\n\n".join(filter(None, sections)) + "\n"


def refresh_card(folder: Path) -> None:
    """Writes FOLDER/README.md anew from what lies in FOLDER/wandapp: recipe, reports, figures of `wandapp eval --save`."""
    home = folder / "wandapp"
    recipe = PruneConfig.from_yaml(home / "recipe.yaml")
    figures = [json.loads(line) for line in _text(home / "eval.jsonl").splitlines()]
    last = {result["text_sha256"] + str(result["seq_len"]): result for row in figures for result in row["perplexities"]}
    recovered = json.loads(_text(home / "recover.json") or "null")
    report = json.loads(_text(home / "report.json") or "{}")
    card = model_card(recipe, report, recovered=recovered, measured=list(last.values()))
    (folder / "README.md").write_text(card + (PACKED_NOTE if is_packed(folder) else ""), encoding="utf-8")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def base_model(reference: str | None) -> str | None:
    """The hub's name of the model that was pruned, or None where it has none (a local path)."""
    if reference is None:
        return None
    reference = _HUB_NAMES.get(reference, reference)
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", reference) and not Path(reference).exists()
    return reference if is_id else None


def _eval_result(result: dict) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=result["text"],
        dataset_split=result["split"] or None,
        metric_type="perplexity",
        metric_name=f"perplexity, context {result['seq_len']}, {result['windows']} windows, {result['dtype']}",
        metric_value=round(result["perplexity"], 4),
    )


def _what(recipe: PruneConfig, report: dict) -> str:
    zeros = f"{report['sparsity']:.2%} of the weights in {report['linears']} linear maps are zero. " if report else ""
    is_permuted = any(block.get("kept_score") for block in report.get("blocks", []))
    permuted = "Before that, channels inside MLPs and attention heads changed places. " if is_permuted else ""
    return (
        f"Pruned in one shot by wandapp with `{recipe.method}`. {zeros}They are stored dense, so any program that loads "
        f"the base model loads this one. {permuted}"
    ).strip()


def _facts(recipe: PruneConfig, report: dict) -> str:
    calibration = [f"- Calibration: {report['calibration']}"] if report.get("calibration") else []
    return "\n".join(
        [
            f"- Base model: `{recipe.model}`",
            f"- Pattern: {recipe.sparsity}" + (" (keeps n of every m inputs)" if ":" in recipe.sparsity else " zeros"),
            *calibration,
            "- Exact options: `wandapp/recipe.yaml`; costs and warnings: `wandapp/report.json`",
            "- Check the pattern: `wandapp verify .`",
        ]
    )


def _training(recovered: dict | None) -> str:
    if not recovered:
        return ""
    return (
        f"Trained after pruning, zeros kept: {recovered['how']}; {recovered['tokens']} tokens of {recovered['text']} in "
        f"{recovered['seconds'] / 60:.1f} minutes. Options and losses: `wandapp/recover.yaml`, `wandapp/recover-loss.jsonl`."
    )


def _perplexities(measured: list[dict], before: dict[str, dict]) -> str:
    if not measured:
        return ""
    columns = ["perplexity on", "context", "windows", *(["before training"] if before else []), "this checkpoint"]
    earlier = {result["text"]: [f"{result['perplexity']:.2f}"] for result in before.values()}
    rows = [
        [
            r["text"],
            str(r["seq_len"]),
            str(r["windows"]),
            *(before and earlier.get(r["text"], ["-"])),
            f"{r['perplexity']:.2f}",
        ]
        for r in measured
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


_LOADING = """## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")
```

`wandapp pack` makes the smaller packed form of it, which `wandapp.load_sparse` runs."""
