"""Several ranks against one process: the same masks, uneven shares, and no rank that waits for one that is gone."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from wandapp.distributed import Share, even_counts
from wandapp.pipeline import prune
from wandapp.report import MachineRate

_SPEC = importlib.util.spec_from_file_location("wandapp_tests_ranks", Path(__file__).with_name("ranks.py"))
harness = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(harness)

SCORES = ["magnitude", "wanda", "sparsegpt", "gblm", "rgs"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As torchrun's ranks have, and safe to fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quiet_rate(monkeypatch):
    """No sampling of the machine's rate, which takes longer than these models."""
    monkeypatch.setattr(MachineRate, "sample", lambda self, repeats=2: None)


def tokens(samples: int, seq_len: int = 24):
    return torch.randint(0, 250, (samples, seq_len), generator=torch.Generator().manual_seed(0))


def pruned(model, methods, samples, ranks=None, **options):
    """{method: (state dict, report)} of copies of the model."""
    results = {}
    for method in methods:
        work = copy.deepcopy(model)
        report = prune(work, method=method, calibration=tokens(samples), ranks=ranks, **options)
        results[method] = work.state_dict(), report
    return results


def disputed(state, other) -> float:
    """Fraction of weights that are zero in one of the two only."""
    return sum(int(((state[n] != 0) != (other[n] != 0)).sum()) for n in state) / sum(t.numel() for t in state.values())


def test_samples_are_dealt_evenly_and_none_is_lost():
    assert even_counts(5, 3) == (2, 2, 1) and even_counts(2, 3) == (1, 1, 0)
    shares = [Share(rank, even_counts(5, 3)) for rank in range(3)]
    assert [share.rows for share in shares] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [share.leading(3) for share in shares] == [2, 1, 0]


@pytest.mark.parametrize("size, samples", [(2, 6), (3, 5), (3, 2)])
def test_ranks_choose_the_masks_of_one_process(tiny_model, tmp_path, size, samples):
    model = tiny_model("llama", num_hidden_layers=2)[0]
    alone = pruned(model, SCORES, samples)
    ended = harness.run_ranks(size, lambda ranks: pruned(model, SCORES, samples, ranks), tmp_path)
    assert [end.code for end in ended] == [0] * size, ended[0].printed
    for method in SCORES:
        first, report = ended[0].result[method]
        for end in ended[1:]:
            assert all(torch.equal(value, first[name]) for name, value in end.result[method][0].items())
        assert disputed(first, alone[method][0]) <= 1e-3, method
        errors = [block.error for block in report.blocks]
        assert errors == pytest.approx([block.error for block in alone[method][1].blocks], rel=1e-4)
        assert report.ranks == size and report.samples == alone[method][1].samples
