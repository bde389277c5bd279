"""Several ranks against one process: the same masks, uneven shares, and no rank that waits for one that is gone."""

import copy
import os
import signal
import subprocess
from contextlib import nullcontext

import pytest
import ranks as harness
import torch
from safetensors.torch import save_file

from wandapp import distributed
from wandapp.blocks import DecoderBlock
from wandapp.config import PruneConfig
from wandapp.corpus import builtin_text
from wandapp.devices import resolve_device
from wandapp.distributed import Share, even_counts
from wandapp.errors import WandappError
from wandapp.job import prune_checkpoint
from wandapp.methods.wanda import Wanda
from wandapp.models import save_pruned
from wandapp.pipeline import checksum, prune
from wandapp.store import ModelStore

pytestmark = pytest.mark.usefixtures("one_thread")
REGIONS = ["block", "sub-block"]
SCORES = ["magnitude", "wanda", "sparsegpt", "admm", "gblm", "rgs"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A life of ranks in tenths of seconds."""
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 1.0)


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


@pytest.mark.parametrize("size, samples", [(2, 5), (3, 2), pytest.param(3, 5, marks=pytest.mark.slow)])
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
        swaps = 2e-3 if method == "admm" else 1e-4  # what rounding swaps is carried on by admm's iterations
        assert errors == pytest.approx([block.error for block in alone[method][1].blocks], rel=swaps)
        assert report.ranks == size and report.samples == alone[method][1].samples


@pytest.mark.parametrize("option", [dict(permute=True), dict(allocate="owl"), dict(allocate="error")], ids=str)
def test_ranks_reorder_channels_and_spread_zeros_as_one_process(tiny_model, tmp_path, option):
    model = tiny_model("llama")[0]
    options = option | dict(sparsity="0.6" if "allocate" in option else "2:4")
    alone, report = pruned(model, ["wanda"], 7, **options)["wanda"]
    ended = harness.run_ranks(3, lambda ranks: pruned(model, ["wanda"], 7, ranks, **options), tmp_path)
    assert [end.code for end in ended] == [0] * 3, [end.said for end in ended]
    for end in ended:
        state, shared = end.result["wanda"]
        assert disputed(state, alone) <= 1e-3 and shared.allocation == pytest.approx(report.allocation, rel=1e-4)
        assert [block.kept_score for block in shared.blocks] == [block.kept_score for block in report.blocks]


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_experts_that_one_rank_alone_met_are_pruned_by_its_tokens(tiny_model, tmp_path, family):
    """Two tokens a rank reach at most four of eight experts."""
    count = dict(num_local_experts=8) if family == "mixtral" else dict(num_experts=8)
    model = tiny_model(family, num_hidden_layers=2, **count)[0]
    methods, options = ["wanda", "sparsegpt", "gblm", "rgs"], dict(sparsity="2:4")
    cut = dict(calibration=tokens(2, 2))

    def work(ranks=None):
        results = {}
        for method in methods:
            copied = copy.deepcopy(model)
            report = prune(copied, method=method, ranks=ranks, **options, **cut)
            results[method] = copied.state_dict(), report
        return results

    alone = work()
    ended = harness.run_ranks(2, work, tmp_path)
    assert [end.code for end in ended] == [0, 0], ended[0].printed + ended[1].printed
    for method in methods:
        first, report = ended[0].result[method]
        assert all(torch.equal(value, first[name]) for name, value in ended[1].result[method][0].items())
        assert disputed(first, alone[method][0]) <= 1e-3, method
        assert report.warnings == alone[method][1].warnings and any(
            "no calibration token" in w for w in report.warnings
        )
        assert set(report.blocks[0].layer_errors) == set(alone[method][1].blocks[0].layer_errors)


def test_ranks_tune_the_whole_model_alike(tiny_model, tmp_path):
    model = tiny_model("llama")[0]
    options = dict(tune_passes=2, tune_lr=3e-3, self_samples=4, batch_size=3)
    alone = pruned(model, ["wanda"], 33, **options)["wanda"][1]
    ended = harness.run_ranks(2, lambda ranks: pruned(model, ["wanda"], 33, ranks, **options), tmp_path, timeout=60)
    assert [end.code for end in ended] == [0] * 2, ended[0].printed
    (first, report), (second, _) = (end.result["wanda"] for end in ended)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert report.samples == 37 and report.tuning["divergence_before"] == pytest.approx(
        alone.tuning["divergence_before"], rel=1e-3
    )
    assert report.tuning["divergence_after"] < report.tuning["divergence_before"]


def test_ranks_of_which_one_cannot_hold_the_whole_model_end_together(tiny_model, tmp_path, monkeypatch):
    model, divergence_of = tiny_model("llama", num_hidden_layers=1)[0], ModelStore.divergence

    def work(ranks):
        def divergence(*arguments):
            if ranks.rank == 1:
                raise torch.OutOfMemoryError
            return divergence_of(*arguments)

        monkeypatch.setattr(ModelStore, "divergence", divergence)
        return pruned(model, ["wanda"], 6, ranks, tune_passes=1)

    ended = harness.run_ranks(2, work, tmp_path, timeout=30)
    assert [end.code for end in ended] == [2, 2]
    assert any(
        "does not fit cpu to be tuned end to end; use --tune-passes 0" in said for end in ended for said in end.said
    )


@pytest.mark.parametrize("options", [{"self_samples": 3}, {"tune_passes": 1}], ids=str)
def test_ranks_stream_together_if_one_is_short_of_memory(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, options):
    save_pruned(tiny_model("llama")[0], tiny_tokenizer(), tmp_path / "dense", files={})
    save_file({"tokens": tokens(6)}, tmp_path / "tokens.safetensors")
    recipe = {"model": str(tmp_path / "dense"), "out": str(tmp_path / "out"), "batch_size": 2} | options

    def work(ranks):
        monkeypatch.setattr("wandapp.job.free_bytes", lambda: 1 if ranks.rank else 10**12)
        monkeypatch.setattr("wandapp.job.join", lambda device: nullcontext(ranks))
        report = prune_checkpoint(PruneConfig(calibration=str(tmp_path / "tokens.safetensors"), **recipe))
        return report.samples, report.tuning

    ended = harness.run_ranks(2, work, tmp_path, timeout=30)
    assert [end.result for end in ended] == [(6, {})] * 2, [end.printed for end in ended]


@pytest.mark.parametrize(
    "method, region",
    [("wanda+ro", "block"), ("wanda++", "block")] + [("wanda+reconstruct", region) for region in REGIONS],
)
def test_refiners_move_all_ranks_alike(tiny_model, tmp_path, method, region):
    """RO draws 2 + 1 + 1 of the ranks' samples, so its last step is of one rank alone; batches of five samples are uneven."""
    model = tiny_model("gpt2", num_hidden_layers=2)[0]
    options = dict(ro_rounds=2, ro_samples=4, sparsity="2:4")
    options |= dict(reconstruct_passes=2, reconstruct_target="dense-path", reconstruct_region=region)
    alone = pruned(model, [method], 5, **options)
    ended = harness.run_ranks(3, lambda ranks: pruned(model, [method], 5, ranks, **options), tmp_path)
    assert [end.code for end in ended] == [0] * 3, ended[0].printed
    first, report = ended[0].result[method]
    for end in ended[1:]:
        assert all(torch.equal(value, first[name]) for name, value in end.result[method][0].items())
    for block, refined in zip(report.blocks, alone[method][1].blocks, strict=True):
        assert block.error < block.error_before
        assert block.error - refined.error < 0.5 * (refined.error_before - refined.error)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("size, samples", [(2, 5), (2, 9), (3, 9), (3, 2)])
def test_reconstruction_takes_as_many_steps_on_every_rank(tiny_model, tmp_path, size, samples, region):
    """A rank that waited for a step of its own would hang: of 3 and 2 samples, 5 and 4; of 3 ranks the first has only
    samples that are held out, or the last has none."""
    model = tiny_model("llama", num_hidden_layers=1)[0]
    options = dict(reconstruct_passes=1, reconstruct_region=region, sparsity="2:4", batch_size=3)
    ended = harness.run_ranks(
        size, lambda ranks: pruned(model, ["wanda+reconstruct"], samples, ranks, **options), tmp_path, timeout=30
    )
    assert [end.code for end in ended] == [0] * size, [end.said for end in ended]


def test_checksum_tells_any_parameter_apart(tiny_model):
    block = tiny_model("mixtral")[0].to(torch.bfloat16).model.layers[0]
    shown = DecoderBlock(0, "block", block, {}, {}, {})
    seen = {checksum(shown)}
    for parameter in block.parameters():
        parameter.data.view(-1)[3] += 0.5
        seen.add(checksum(shown))
        parameter.data.view(-1)[[0, -1]] = parameter.data.view(-1)[[-1, 0]]
        seen.add(checksum(shown))
    assert len(seen) == 1 + 2 * len(list(block.parameters()))


def fail_on(rank: int, act):
    """Work in which one rank acts while the others wait for it."""

    def work(ranks):
        if ranks.rank == rank:
            act()
        ranks.sum_(torch.ones(1))

    return work


def refuse():
    raise WandappError("shard-3: cannot be read; fetch it again")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_all_and_is_said_once(tmp_path, rank):
    ended = harness.run_ranks(3, fail_on(rank, refuse), tmp_path, timeout=20)
    assert [end.code for end in ended] == [2, 2, 2]
    said = [f"{'rank 1: ' if rank else ''}shard-3: cannot be read; fetch it again"]
    assert [end.said for end in ended] == [said if end is ended[rank] else [] for end in ended]


def test_an_error_of_all_ranks_is_said_by_the_first(tiny_model, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)[0]
    model.model.layers[1].mlp.down_proj.weight.data[3, 7] = float("nan")
    ended = harness.run_ranks(2, lambda ranks: pruned(model, ["wanda"], 4, ranks), tmp_path, timeout=20)
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].said[0].startswith("model.layers.1.mlp.down_proj") and len(ended[0].said + ended[1].said) == 1


def test_what_only_rank_0_does_fails_on_all(tmp_path):
    ended = harness.run_ranks(2, lambda ranks: ranks.first(refuse), tmp_path, timeout=20)
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].said == ["shard-3: cannot be read; fetch it again"] and ended[1].said == []


def test_a_mistake_of_ours_on_one_rank_ends_the_others(tmp_path):
    ended = harness.run_ranks(2, fail_on(1, lambda: [][1]), tmp_path, timeout=20)
    assert ended[0].code == 2 and "IndexError" in ended[1].printed


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 also holds the store
def test_a_killed_rank_ends_the_others(tmp_path, rank):
    ended = harness.run_ranks(3, fail_on(rank, lambda: os.kill(os.getpid(), signal.SIGKILL)), tmp_path, timeout=20)
    assert [end.code for end in ended] == [-9 if end is ended[rank] else 2 for end in ended]
    said = [line for end in ended for line in end.said]
    assert all("lost" in line or "cannot meet" in line for line in said)
    assert len(said) == 1 or rank == 0  # without the store no rank knows whether another one spoke


@pytest.mark.slow
def test_a_frozen_rank_is_missed(tmp_path):
    def freeze():
        subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    ended = harness.run_ranks(2, fail_on(1, freeze), tmp_path, timeout=30)
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].said[0].startswith("rank 1 stopped answering")


def test_ranks_whose_weights_differ_are_told_apart_by_block(tiny_model, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)[0]

    def work(ranks):
        exact = Wanda.terms
        if ranks.rank == 1:
            Wanda.terms = lambda self, view, measured: exact(self, view, measured)._replace(
                column_scale=measured.column_norm(view) + torch.arange(view.weight.shape[1]) * ("1.mlp.up" in view.name)
            )
        pruned(model, ["wanda"], 4, ranks)

    ended = harness.run_ranks(2, work, tmp_path, timeout=20)
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].said[0].startswith("model.layers.1: rank 1 computed other weights than rank 0")


@pytest.mark.parametrize(
    "name, gpus, local_rank, device",
    [
        ("auto", 4, 2, "cuda:2"),
        ("cuda", 4, 0, "cuda:0"),
        ("cuda", 1, 2, "cuda"),  # the launcher shows each rank its own
        ("auto", 0, 2, "cpu"),
        ("cpu", 4, 2, "cpu"),
    ],
)
def test_each_rank_gets_a_gpu_of_its_own(monkeypatch, name, gpus, local_rank, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert str(resolve_device(name)) == device


@pytest.mark.parametrize("name, message", [("cuda:1", "each gets its own"), ("cuda", "2 CUDA devices are visible")])
def test_ranks_that_would_share_a_gpu_are_refused(monkeypatch, name, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(WandappError, match=message):
        resolve_device(name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_refinement_by_ranks_keeps_the_perplexity_of_one_process(tiny_model, tmp_path, size):
    """On a model that learned its text, and with a third of the text held out."""
    torch.manual_seed(1)
    text = torch.tensor(list(builtin_text("calibration").encode()[:240_000]))
    learned, held_out = text[:160_000], text[160_000:]
    model = tiny_model("llama", num_hidden_layers=2)[0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 4e-3 * (1 - step / 150)
        rows = torch.stack([learned[i : i + 64] for i in torch.randint(0, len(learned) - 64, (16,)).tolist()])
        optimiser.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimiser.step()
    samples = learned[: 32 * 64].view(32, 64)

    def perplexity(ranks=None, method="wanda++"):
        copied = copy.deepcopy(model)
        prune(copied, method=method, sparsity="2:4", calibration=samples, ranks=ranks, ro_samples=32)
        with torch.no_grad():
            rows = held_out[: 256 * 64].view(256, 64)
            return copied(input_ids=rows, labels=rows).loss.exp().item()

    alone, unrefined = perplexity(), perplexity(method="rgs")
    results = [rank.result for rank in harness.run_ranks(size, perplexity, tmp_path)]
    assert alone < unrefined
    assert results == [results[0]] * size and results[0] == pytest.approx(alone, rel=0.005)
