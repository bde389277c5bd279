"""For those who prune in bulk: many settings, one table, every result verified, and no run lost to another's failure.

python examples/bulk_pruning.py MODEL OUT
"""

# %% The jobs: every combination, as recipes. A bad one is refused here, before any model is loaded.
import sys
from itertools import product
from pathlib import Path

import wandapp
from wandapp.report import PruneReport

MODEL, OUT = (sys.argv[1:3] + ["smollm2", "out/bulk"][len(sys.argv[1:3]) :])[:2]
TEXT = {"calibration": "pydoc", "samples": 16, "seq_len": 128}

jobs = [
    wandapp.PruneConfig(
        model=MODEL, out=f"{OUT}/{method}-{pattern.replace(':', 'of')}", method=method, sparsity=pattern, **TEXT
    )
    for method, pattern in product(["magnitude", "wanda", "sparsegpt"], ["2:4", "0.5"])
]


# %% One job: load, prune, verify, save. What is saved is complete: a folder appears under its name at the end.
def run(recipe: wandapp.PruneConfig) -> tuple[PruneReport, float]:
    model, tokenizer = wandapp.load_model(recipe.model)
    report = wandapp.prune(model, tokenizer, config=recipe)
    verified = wandapp.verify_model(model, recipe.sparsity, together=recipe.is_allocated)
    assert verified.ok, verified.first_offence
    wandapp.save_pruned(model, tokenizer, recipe.out, files={"wandapp/recipe.yaml": recipe.resolved().dump_yaml()})
    return report, wandapp.perplexity(model, tokenizer, text="pydoc", seq_len=128, windows=8).perplexity


# %% All jobs. A finished one is not done again; one that fails says why and the next goes on.
failed = []
for recipe in jobs:
    if Path(recipe.out).exists():
        print(f"{recipe.out}: done already")
        continue
    try:
        report, perplexity = run(recipe)
    except wandapp.WandappError as error:
        failed.append(f"{recipe.out}: {error}")
        continue
    print(f"{recipe.out:24} {report.sparsity:.4f} zeros  {report.seconds:6.1f} s  perplexity {perplexity:10.2f}")
    for warning in report.warnings:
        print(f"  warning: {warning}")

# %% The end of a batch job is its exit code.
print(*failed, sep="\n")
sys.exit(1 if failed else 0)
