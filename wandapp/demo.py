"""What `make demo` shows: a real model pruned, compared, verified, saved and used, on text that every machine has."""

import copy
import time
from pathlib import Path
from typing import Any

from wandapp.cli import prune_with_progress
from wandapp.config import PruneConfig
from wandapp.console import Output, duration
from wandapp.errors import WandappError
from wandapp.evaluate import perplexity
from wandapp.inference import load_sparse
from wandapp.job import companion_files
from wandapp.models import load_model, save_pruned
from wandapp.output import check_output
from wandapp.packing import pack_checkpoint
from wandapp.tokenizer import generate
from wandapp.verify import verify_model

CALIBRATION: dict[str, Any] = {"calibration": "pydoc", "samples": 32, "seq_len": 512}
CONTENDERS = {  # the last one is saved; wanda++ at a fifth of its usual steps, to be done in minutes
    "magnitude": CALIBRATION,
    "wanda": CALIBRATION,
    "wanda++": CALIBRATION | {"samples": 32, "seq_len": 256, "ro_rounds": 2, "ro_samples": 16},
}
EVALUATION: dict[str, Any] = {
    "text": "pydoc",
    "seq_len": 512,
    "windows": 10,
}  # the part of the text that calibration never sees
COLUMNS = {"model": "", "perplexity": ".2f", "sparsity": ".4f", "seconds": ".1f", "peak_gib": ".2f"}
PROMPT = "In Python, a list is"
NEW_TOKENS = 24


def run_demo(out: Path, output: Output) -> dict[str, Any]:
    """Prune SmolLM2-135M to 2:4 by each contender, print the comparison, save the last; the figures."""
    start = time.monotonic()
    check_output(out, overwrite=True)
    output.note("loading SmolLM2-135M, a real model of 30 Llama blocks (about 20 s)")
    dense, tokenizer = load_model("smollm2")
    rows = [{"model": "dense", "perplexity": _perplexity(dense, tokenizer, output)}]
    for method, options in CONTENDERS.items():
        recipe = PruneConfig(model="smollm2", out=str(out), overwrite=True, method=method, sparsity="2:4", **options)
        model = copy.deepcopy(dense)
        report = prune_with_progress(model, tokenizer, recipe, output)
        cost = {"sparsity": report.sparsity, "seconds": report.seconds, "peak_gib": report.peak_gib}
        rows.append({"model": f"{method} 2:4", "perplexity": _perplexity(model, tokenizer, output), **cost})
    verified = verify_model(model, recipe.sparsity)
    if not verified.ok:
        raise WandappError(f"the pruned model does not hold its pattern: {verified.first_offence}; please report this")
    save_pruned(model, tokenizer, out, files=companion_files(recipe, report), overwrite=True)
    output.table(list(COLUMNS), [_cells(row) for row in rows])
    output.result(f"\nverified: {verified.linears} linear maps hold 2:4\nsaved: {out}")
    packed = out.with_name(out.name + "-packed")
    sizes = pack_checkpoint(out, packed, overwrite=True)
    output.result(
        f"packed: {packed}, pruned linear maps {sizes.linear_dense_bytes / 2**20:.0f} -> "
        f"{sizes.linear_packed_bytes / 2**20:.0f} MiB, all tensors {sizes.dense_bytes / 2**20:.0f} -> "
        f"{sizes.packed_bytes / 2**20:.0f} MiB\n"
    )
    writers = {"dense": dense, f"{method} 2:4, dense with zeros": model, f"{method} 2:4, packed": load_sparse(packed)}
    for name, writer in writers.items():
        text, rate = _write(writer, tokenizer)
        output.result(f"{name} ({rate:.1f} tokens/s) writes: {PROMPT} {text}")
    seconds = time.monotonic() - start
    output.note(f"everything together took {duration(seconds)}")
    return {"rows": rows, "verified_linears": verified.linears, "out": str(out), "seconds": seconds}


def _perplexity(model: Any, tokenizer: Any, output: Output) -> float:
    with output.progress("perplexity: window") as update:
        return perplexity(model, tokenizer, on_progress=update, **EVALUATION).perplexity


def _write(model: Any, tokenizer: Any) -> tuple[str, float]:
    """What the model writes after the prompt, and its tokens per second in the better of two runs, prompt included."""
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        text = generate(model, tokenizer, PROMPT, NEW_TOKENS)
        seconds.append(time.monotonic() - start)
    return " ".join(text.split()), NEW_TOKENS / min(seconds)


def _cells(row: dict[str, Any]) -> list[str]:
    return [format(row[name], form) if name in row else "-" for name, form in COLUMNS.items()]
