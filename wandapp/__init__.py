"""wandapp: prune large language models in one shot, prove the pattern, and keep the result usable.

    import wandapp
    model, tokenizer = wandapp.load_model("smollm2")
    report = wandapp.prune(model, tokenizer, sparsity="2:4", method="wanda", calibration="pydoc")

Public names are imported when first used, so `import wandapp` and `wandapp --help` stay quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "PruneConfig": "wandapp.config",
    "SparsityPattern": "wandapp.pattern",
    "WandappError": "wandapp.errors",
    "load_model": "wandapp.models",
    "save_pruned": "wandapp.models",
    "prune": "wandapp.pipeline",
    "prune_checkpoint": "wandapp.job",
    "PruneReport": "wandapp.report",
    "pack_checkpoint": "wandapp.packing",
    "unpack_checkpoint": "wandapp.packing",
    "load_sparse": "wandapp.inference",
    "sparsify": "wandapp.inference",
    "save_sparse": "wandapp.saving",
    "export_torch_24": "wandapp.export",
    "load_torch_24": "wandapp.export",
    "SparseLinear": "wandapp.modules",
    "perplexity": "wandapp.evaluate",
    "verify_model": "wandapp.verify",
    "recover": "wandapp.recovery",
    "RecoverConfig": "wandapp.recover_config",
    "inspect_checkpoint": "wandapp.inspection",
    "evaluate_checkpoint": "wandapp.evaluation",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wandapp' has no attribute {name!r}; public names: {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
