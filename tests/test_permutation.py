"""Channels change places only where the dense model stays the same, the search keeps no less score, and statistics follow."""

import copy
import itertools
import json

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wandapp import channel_order, folding, permutation
from wandapp.channel_order import best_order, kept_score
from wandapp.cli import main
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.folding import Fold, Trace
from wandapp.job import prune_checkpoint
from wandapp.models import save_pruned
from wandapp.pattern import SparsityPattern
from wandapp.permutation import permute_channels
from wandapp.pipeline import prune
from wandapp.statistics import measure
from wandapp.store import ModelStore
from wandapp.verify import verify_model

TOKENS = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0))
TWO_OF_FOUR = SparsityPattern.parse("2:4")
# Maps of one block whose inputs are permuted: attention's output and the MLP's, or each of four experts'.
PERMUTED = {"mixtral": 5, "qwen3_moe": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


def opened(model: nn.Module, pattern: SparsityPattern = TWO_OF_FOUR):
    """(store, hidden states of the calibration tokens), ready to open blocks."""
    store = ModelStore(model.requires_grad_(False), pattern, device=torch.device("cpu"))
    return store, store.record(TOKENS, batch_size=2)


def permuted(model: nn.Module, score=lambda view: view.weight.float().abs(), pattern=TWO_OF_FOUR) -> list:
    """Permutes every block of a dense model in place by a score; what was done to each."""
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.config._experts_implementation = "eager"
    store, hidden = opened(model, pattern)
    done = []
    for index in range(len(store)):
        with store.open_block(index) as block:
            measured = measure(block, hidden, frozenset(), Ranks(), outputs=1)
            done.append(permute_channels(block, hidden, measured, pattern, score, Ranks()))
            block.run_(hidden)
    return done


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def shuffled(score: Tensor, *, n: int, m: int) -> channel_order.Order:
    """In the place of the search: any order."""
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(1))
    return channel_order.Order(order, 0.0, 0.0, 1.0)


def test_any_order_of_channels_leaves_the_dense_model_as_it_was(tiny_model, tiny_family, monkeypatch):
    monkeypatch.setattr(permutation, "best_order", shuffled)
    dense = tiny_model(tiny_family)[0]
    moved = copy.deepcopy(dense)
    done = permuted(moved)
    assert [len(block.kept) for block in done] == [PERMUTED.get(tiny_family, 2)] * 3
    assert not any(block.skipped for block in done)
    # Sums in another order: some ten roundings of fp32 in each of three blocks. A wrong channel changes all digits.
    assert relative_difference(moved(TOKENS).logits, dense(TOKENS).logits) < 5e-6
    changed = [name for name, value in moved.state_dict().items() if not torch.equal(value, dense.state_dict()[name])]
    assert len(changed) >= 3 * 4, "channels did change places"


def test_experts_that_the_tested_sample_does_not_reach_are_permuted_like_the_others(tiny_model, monkeypatch):
    monkeypatch.setattr(permutation, "best_order", shuffled)
    dense = tiny_model("qwen3_moe", num_experts=32, num_hidden_layers=1)[0]
    dense.config._experts_implementation = "eager"
    store, hidden = opened(dense)
    with store.open_block(0) as block:
        reached = [name for name in Trace(block, hidden[:1]).inputs if "down_proj" in name]
    assert 0 < len(reached) < 32
    moved = copy.deepcopy(dense)
    (done,) = permuted(moved)
    assert len([name for name in done.kept if "down_proj" in name]) == 32
    assert relative_difference(moved(TOKENS).logits, dense(TOKENS).logits) < 5e-6  # the other samples reach the rest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_models_stored_in_16_bits_pass_the_same_test(tiny_model, monkeypatch, family, dtype):
    monkeypatch.setattr(permutation, "best_order", shuffled)
    done = permuted(tiny_model(family, num_hidden_layers=1)[0].to(dtype))
    assert [len(block.kept) for block in done] == [PERMUTED.get(family, 2)] and not done[0].skipped


class WithNorm(nn.Module):
    """A map behind a norm of its inputs, as BitNet has them."""

    def __init__(self, inner: nn.Module, weight: Tensor):
        super().__init__()
        self.inner, self.norm = inner, nn.Parameter(weight)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.norm)


@pytest.mark.parametrize("centre", [1.0, 0.0])
def test_a_norm_between_two_maps_is_noticed_however_flat(tiny_model, monkeypatch, centre):
    """In bfloat16 its channels differ by less than the test of a fold can see."""
    monkeypatch.setattr(permutation, "best_order", shuffled)
    dense = tiny_model("llama", num_hidden_layers=1)[0].to(torch.bfloat16)
    mlp = dense.model.layers[0].mlp
    flat = 1 + 0.01 * torch.randn(mlp.down_proj.in_features, generator=torch.Generator().manual_seed(0))
    mlp.down_proj = WithNorm(mlp.down_proj, flat.to(torch.bfloat16))
    if centre == 0.0:  # as Gemma counts
        mlp.down_proj.norm.data -= 1
        mlp.down_proj.forward = lambda x: mlp.down_proj.inner(x * (1 + mlp.down_proj.norm))
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    (done,) = permuted(dense)
    assert any("down_proj" in name for name in done.skipped) and len(done.kept) == 1
    changed = [name for name, value in dense.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and not any("mlp" in name or "norm" in name for name in changed)


def test_grouped_queries_share_the_order_of_their_values(tiny_model):
    """Four query heads of sixteen channels, two heads of values: the columns of o move alike in both heads of a pair."""
    model = tiny_model("llama")[0]
    store, hidden = opened(model)
    with store.open_block(0) as block:
        trace = Trace(block, hidden[:1])
        (fold,) = folding.proposals(block, trace, "model.layers.0.self_attn.o_proj")
    assert fold.columns.shape == (2, 16, 2) and list(fold.rows) == ["model.layers.0.self_attn.v_proj"]
    assert fold.columns[:, 0].tolist() == [[0, 16], [32, 48]]
    assert fold.rows["model.layers.0.self_attn.v_proj"][:, 0].tolist() == [[0], [16]]


@pytest.mark.parametrize(
    "family, consumer, change",
    [
        ("llama", "mlp.down_proj", lambda fold: {name: rows for name, rows in fold.rows.items() if "up" in name}),
        ("phi3", "mlp.down_proj", lambda fold: {name: rows[:, :, :1] for name, rows in fold.rows.items()}),
        ("llama", "self_attn.o_proj", lambda fold: {"model.layers.0.self_attn.k_proj": next(iter(fold.rows.values()))}),
        ("opt", "self_attn.out_proj", lambda fold: {name: rows.roll(1, 1) for name, rows in fold.rows.items()}),
    ],
)
def test_a_wrong_fold_is_undone_bit_for_bit_and_said(tiny_model, monkeypatch, family, consumer, change):
    proposals = folding.proposals

    def wrong(block, trace, name):
        folds = proposals(block, trace, name)
        return (Fold(fold.consumer, fold.columns, change(fold)) for fold in folds) if consumer in name else folds

    monkeypatch.setattr(permutation, "proposals", wrong)
    monkeypatch.setattr(permutation, "best_order", shuffled)
    dense = tiny_model(family, num_hidden_layers=1)[0]
    moved = copy.deepcopy(dense)
    (done,) = permuted(moved)
    assert list(done.skipped.values()) == [permutation.NO_FOLD] and consumer in next(iter(done.skipped))
    assert len(done.kept) == 1
    prefix = {"opt": "model.decoder.layers.0"}.get(family, "model.layers.0")
    assert torch.equal(*(m.get_submodule(f"{prefix}.{consumer}").weight for m in (moved, dense)))


def test_what_cannot_be_permuted_is_counted_and_named(tiny_model, monkeypatch):
    monkeypatch.setattr(permutation, "proposals", lambda *_: iter(()))
    model = tiny_model("mixtral", num_hidden_layers=2)[0]
    report = prune(model, calibration=TOKENS, sparsity="2:4", permute=True)
    shown = [warning for warning in report.warnings if "not permuted" in warning]
    assert len(shown) == 2 and "o_proj and 4 more: not permuted, its input is not made" in shown[0]


def test_heads_that_are_no_whole_groups_stay(tiny_model):
    model = tiny_model("llama", num_hidden_layers=1)[0]
    report = prune(model, calibration=TOKENS, sparsity="16:32", permute=True)
    assert "o_proj: not permuted, sets of 16 channels do not divide into groups of 32" in report.warnings[0]
    assert [name.rpartition(".")[2] for name in report.blocks[0].kept_score] == ["down_proj"]


def test_unstructured_patterns_say_why_nothing_moves(tiny_model):
    dense = tiny_model("llama", num_hidden_layers=1)[0]
    plain, asked = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(plain, calibration=TOKENS, sparsity="0.5")
    report = prune(asked, calibration=TOKENS, sparsity="0.5", permute=True)
    assert [w for w in report.warnings if "no order of channels" in w] and not report.blocks[0].kept_score
    assert all(map(torch.equal, plain.state_dict().values(), asked.state_dict().values()))


# What was measured before follows the channels: permuting first and pruning plainly gives the same weights.
FOLLOWED = {
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {},
    "admm": {},
    "gblm": {},
    "rgs": {"preset": "paper"},
    "wanda++": {"ro_rounds": 1, "ro_samples": 2},
}


@pytest.mark.parametrize(
    "family, method",
    [
        *(("llama", method) for method in FOLLOWED),
        ("gpt2", "sparsegpt"),
        *(pytest.param("gpt2", method, marks=pytest.mark.slow) for method in FOLLOWED if method != "sparsegpt"),
    ],
)
def test_statistics_follow_the_channels(tiny_model, monkeypatch, family, method):
    monkeypatch.setattr(permutation, "best_order", shuffled)
    options = dict(calibration=TOKENS, sparsity="2:4", method=method, **FOLLOWED[method])
    layers = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
    dense = tiny_model(family, **{layers: 1})[0]
    at_once, first = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(at_once, permute=True, **options)
    permuted(first)
    prune(first, permute=False, **options)
    for (name, a), b in zip(at_once.state_dict().items(), first.state_dict().values(), strict=True):
        assert ((a != 0) != (b != 0)).float().mean() <= 0.001, name  # scores that are equal up to rounding
        assert (a - b).norm() <= 1e-3 * b.norm(), name


def heavy_tailed(channels: int, rows: int, seed: int = 0) -> Tensor:
    """Scores [channels, rows] like those of a language model: some channels and some weights far above the rest."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, rows, generator=generator).abs()
    return (
        weight * torch.randn(channels, 1, generator=generator).exp() * torch.rand(channels, rows, generator=generator)
    )


def kept_by_loops(score: Tensor, order: list[int], n: int, m: int) -> float:
    rows = score.T.tolist()
    return sum(
        sum(sorted((row[c] for c in order[first : first + m]), reverse=True)[:n])
        for row in rows
        for first in range(0, len(order), m)
    )


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_kept_score_is_what_the_choice_keeps(n, m):
    score = heavy_tailed(8, 5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    assert kept_score(score, order.view(-1, m), n) == pytest.approx(
        kept_by_loops(score, order.tolist(), n, m), rel=1e-6
    )


def test_search_comes_close_to_the_best_of_all_orders():
    """Eight channels fall into two groups in 35 ways; of the span from the worst to the best little is missed."""
    missed = []
    for seed in range(8):
        score = heavy_tailed(8, 6, seed)
        splits = (
            [0, *trio, *(c for c in range(1, 8) if c not in trio)] for trio in itertools.combinations(range(1, 8), 3)
        )
        values = [kept_by_loops(score, order, 2, 4) for order in splits]
        found = best_order(score, n=2, m=4)
        assert sorted(found.channels.tolist()) == list(range(8))
        assert found.kept == pytest.approx(kept_by_loops(score, found.channels.tolist(), 2, 4), rel=1e-6)
        assert found.kept_before == pytest.approx(values[0], rel=1e-6)
        assert max(values) * (1 + 1e-6) >= found.kept >= found.kept_before * (1 - 1e-12)
        missed.append((max(values) - found.kept) / (max(values) - min(values)))
    assert max(missed) < 0.15 and sum(missed) / len(missed) < 0.05, missed


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (2, 2), (5, 20)])
@pytest.mark.parametrize("score", [heavy_tailed(40, 30), torch.ones(40, 30), torch.zeros(40, 30)])
def test_search_never_keeps_less(score, n, m):
    found = best_order(score, n=n, m=m)
    assert sorted(found.channels.tolist()) == list(range(40))
    assert found.kept == kept_score(score, found.channels.view(-1, m), n)
    assert found.kept >= found.kept_before * (1 - 1e-12)  # fp64 sums of equal terms in another order


def test_strong_groups_come_first():
    score = heavy_tailed(64, 20)
    mass = score.double().sum(dim=1)[best_order(score, n=2, m=4).channels].view(-1, 4).sum(dim=1)
    assert (mass.diff() <= 0).all()


def test_a_best_order_stays():
    """Groups that lose nothing but their zeros cannot be bettered."""
    score = torch.tensor([1.0, 1.0, 0.0, 0.0] * 10)[:, None].expand(40, 30)
    assert torch.equal(best_order(score, n=2, m=4).channels, torch.arange(40))


def test_search_gains_on_heavy_tails_and_repeats_itself():
    score = heavy_tailed(256, 64)
    found, again = best_order(score, n=2, m=4), best_order(score, n=2, m=4)
    assert torch.equal(found.channels, again.channels)
    assert found.kept - found.kept_before > 0.02 * found.total
    parts = kept_score(score, channel_order.spread(score, 4), 2)
    assert found.kept > parts > found.kept_before


def test_more_groups_than_deal_at_once(monkeypatch):
    score = heavy_tailed(256, 64)
    whole = best_order(score, n=2, m=4)
    monkeypatch.setattr(channel_order, "PART", 10)
    parts = best_order(score, n=2, m=4)
    assert sorted(parts.channels.tolist()) == list(range(256))
    assert parts.kept - parts.kept_before > 0.8 * (whole.kept - whole.kept_before)


def test_maps_whose_inputs_are_permuted_lose_less(tiny_model):
    dense, lost = tiny_model("llama", intermediate_size=512, num_hidden_layers=1)[0], []
    for permute in (False, True):
        tested = copy.deepcopy(dense)
        (record,) = prune(tested, calibration=TOKENS, sparsity="2:4", permute=permute).blocks
        lost.append([record.layer_errors[f"model.layers.0.{name}"] for name in ("self_attn.o_proj", "mlp.down_proj")])
        assert verify_model(tested, "2:4").ok
    assert all(after > before for before, after in record.kept_score.values())
    assert lost[1][0] < lost[0][0] and lost[1][1] < 0.9 * lost[0][1], lost


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "llama"
    save_pruned(tiny_model("llama")[0], tiny_tokenizer(), folder, files={})
    tokens = folder.with_name("tokens.safetensors")
    save_file({"tokens": TOKENS}, tokens)
    return folder, tokens


def test_command_prunes_verifies_and_tells_what_it_did(checkpoint, tmp_path, monkeypatch, capfd):
    folder, tokens = map(str, checkpoint)
    out = tmp_path / "out"
    call = ["prune", folder, "--calibration", tokens, "--permute", "--method", "sparsegpt+ro", "--ro-rounds", "1"]
    for arguments in ([*call, "--ro-samples", "2", "--out", str(out)], ["verify", str(out), "--sparsity", "2:4"]):
        monkeypatch.setattr("sys.argv", ["wandapp", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code in (0, None), capfd.readouterr().err
    report = json.loads((out / "wandapp" / "report.json").read_text())
    for block in report["blocks"]:
        assert len(block["kept_score"]) == 2 and block["permute_seconds"] > 0
        assert all(after > before for before, after in block["kept_score"].values())
    assert "permute: true" in (out / "wandapp" / "recipe.yaml").read_text()
    assert "changed places" in (out / "README.md").read_text()
    figures = [json.loads(line) for line in (out / "wandapp" / "blocks.jsonl").read_text().splitlines()]
    assert all(0.5 < row["kept_score_before"] < row["kept_score"] < 1 for row in figures)


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_is_continued_gives_the_same_bits(checkpoint, tmp_path, stream):
    def recipe(out: str) -> PruneConfig:
        folder, tokens = map(str, checkpoint)
        options = dict(model=folder, calibration=tokens, permute=True, stream=stream)
        return PruneConfig(out=str(tmp_path / out), **options)

    class Stopped(Exception):
        pass

    def stop(progress) -> None:
        if progress.block == 1:
            raise Stopped

    prune_checkpoint(recipe("whole"))
    with pytest.raises(Stopped):
        prune_checkpoint(recipe("continued"), on_progress=stop)
    prune_checkpoint(recipe("continued"), resume=True)
    whole, continued = (
        {
            name: value
            for path in sorted((tmp_path / out).glob("*.safetensors"))
            for name, value in load_file(path).items()
        }
        for out in ("whole", "continued")
    )
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


@pytest.mark.slow
def test_ranks_permute_alike(tiny_model, tmp_path):
    """Three samples on two ranks; one process finds the same orders but for sums rounded otherwise."""

    def work(own: Ranks):
        model = tiny_model("llama")[0]
        report = prune(model, calibration=TOKENS[:3], sparsity="2:4", permute=True, ranks=own)
        return model.state_dict(), [block.kept_score for block in report.blocks]

    alone, kept_alone = work(Ranks())
    ended = ranks.run_ranks(2, work, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], [rank.said for rank in ended]
    first, second = (rank.result for rank in ended)
    assert all(torch.equal(first[0][name], second[0][name]) for name in alone)
    for a, b in zip(first[1], kept_alone, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name][1] == pytest.approx(b[name][1], abs=2e-3) for name in a)


class ReadTwice(nn.Linear):
    """A map whose output a second map, `reader`, reads too."""

    reader: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.read = self.reader(y)
        return y


def test_channels_that_a_second_map_reads_stay(tiny_model, monkeypatch):
    monkeypatch.setattr(permutation, "best_order", shuffled)
    model = tiny_model("opt", num_hidden_layers=1)[0]
    attention = model.model.decoder.layers[0].self_attn
    attention.v_proj.__class__ = ReadTwice
    attention.v_proj.reader = nn.Linear(64, 8)
    before = attention.out_proj.weight.clone()
    (done,) = permuted(model)
    assert done.skipped == {"model.decoder.layers.0.self_attn.out_proj": permutation.NO_FOLD}
    assert torch.equal(attention.out_proj.weight, before)
