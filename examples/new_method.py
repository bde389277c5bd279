"""A pruning method of your own in one file: RIA (relative importance and activations), beside Wanda.

    score_ij = (|W_ij| / sum_k |W_ik| + |W_ij| / sum_k |W_kj|) * sqrt(s_j)

is of the form |W_ij| * (alpha * G_ij + s_j) with G_ij = (1 / row sum + 1 / column sum) * sqrt(s_j), alpha = 1 and no
column scale of its own. So there is nothing to select or to zero here: the method supplies its terms.

    python examples/new_method.py MODEL
"""

import sys

import torch

import wandapp
from wandapp.blocks import LinearView
from wandapp.methods import METHODS
from wandapp.methods.base import Method, ScoreTerms
from wandapp.statistics import Measurements


class RelativeImportance(Method):
    """Weights that matter to their row or their column, scaled by the square root of their input's norm."""

    needs = frozenset({"column_norm"})  # of wandapp.statistics: measured in the dense block's one forward

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        magnitude = view.weight.float().abs()  # [out_features, in_features]
        rows, columns = magnitude.sum(dim=1, keepdim=True), magnitude.sum(dim=0, keepdim=True)
        gradient = (1 / rows.clamp_min(1e-12) + 1 / columns.clamp_min(1e-12)) * measured.column_norm(view).sqrt()
        return ScoreTerms(torch.zeros_like(columns[0]), gradient, alpha=1.0)


METHODS["ria"] = RelativeImportance  # from here on "ria" and "ria+ro" are methods like any other


def compare(model: str, samples: int = 32, seq_len: int = 256, windows: int = 10) -> dict[str, float]:
    """Perplexity of `model` at 2:4 by method."""
    found = {}
    for method in ("wanda", "ria", "ria+ro"):
        loaded, tokenizer = wandapp.load_model(model)
        options = {"calibration": "pydoc", "samples": samples, "seq_len": seq_len, "ro_rounds": 1}
        wandapp.prune(loaded, tokenizer, method=method, sparsity="2:4", **options)
        result = wandapp.perplexity(loaded, tokenizer, text="pydoc", seq_len=seq_len, windows=windows)
        found[method] = result.perplexity
        print(f"{method:8} {result.perplexity:.2f}")
    return found


if __name__ == "__main__":
    compare(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
