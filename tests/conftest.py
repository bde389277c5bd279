"""Fixtures for all tests. Helpers without state are plain modules: tiny, oracle, ranks, hostile."""

from pathlib import Path

import pytest
import tiny
import torch

from wandapp import save_pruned
from wandapp.report import MachineRate


@pytest.fixture(autouse=True, scope="session")
def small_rate_products():
    """A run times matrix products beside its work; at full size they take many times as long as pruning a tiny model."""
    full, MachineRate.SIZES = MachineRate.SIZES, {"cpu": 64, "cuda": 64}
    yield
    MachineRate.SIZES = full


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(family, seed=0, **config_fields) -> (model, config)."""
    return tiny.tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """tiny_tokenizer(add_bos=False) -> byte-level tokenizer."""
    return tiny.tiny_tokenizer


@pytest.fixture(scope="session")
def pruned_checkpoint(tmp_path_factory):
    """pruned_checkpoint(family, sparsity, dtype="float32", **config_fields) -> (model, its folder)."""
    made = {}

    def make(family: str, sparsity: str, dtype: str = "float32", **fields):
        key = (family, sparsity, dtype, *sorted(fields.items()))
        if key not in made:
            model = tiny.tiny_model(family, **fields)[0].to(getattr(torch, dtype))
            with torch.no_grad():
                tiny.prune_by_magnitude(model, sparsity)
            folder = tmp_path_factory.mktemp("pruned") / family
            recipe = {"wandapp/recipe.yaml": f"sparsity: '{sparsity}'\n", "README.md": "# tiny\n"}
            save_pruned(model, tiny.tiny_tokenizer(), folder, files=recipe)
            made[key] = model, folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def originals(pruned_checkpoint, tmp_path_factory) -> Path:
    """The folder of good files that tests of bad input copy and damage."""
    import hostile  # and pyarrow with it

    folder = tmp_path_factory.mktemp("originals")
    hostile.make_originals(
        folder, tiny.tiny_model("llama")[0], tiny.tiny_tokenizer(), pruned_checkpoint("llama", "2:4")[1]
    )
    return folder


@pytest.fixture(params=sorted(tiny.FAMILIES))
def tiny_family(request) -> str:
    """The name of each supported family in turn."""
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Threads of matrices this small only wait for each other, and for minutes where the machine is busy; none may be
    there before a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
