"""The interface of pruning methods, and the one way in which a linear map is pruned by a score.

A score-only method supplies `needs` and `terms`; a method that also changes the kept weights overrides `apply`; a refiner
(`wandapp.methods.refiner`) wraps a method and improves the block that it pruned.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wandapp.blocks import DecoderBlock, LinearView
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.errors import NonFiniteScoreError, UnreachableSparsityError, WandappError
from wandapp.histograms import BlockHistograms
from wandapp.kernels.select import prune_nm_, prune_rows_
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements, measure, token_rms

ERROR_SAMPLES = 4  # leading samples on which a block's error is measured, where their dense outputs are kept


class ScoreTerms(NamedTuple):
    """score_ij = |W_ij| * (alpha * gradient_ij + column_scale_j); a missing scale counts as 1, a missing gradient as 0."""

    column_scale: Tensor | None = None  # [in_features] fp32
    gradient: Tensor | None = None  # [out_features, in_features] fp32
    alpha: float = 0.0


@dataclass
class BlockRecord:
    """What the report keeps of one block.

    error           ||T - f_pruned(X)|| / ||T|| on the probe samples, after everything; T is f(X), or the dense model's own
                    states where a refiner follows them
    error_before    the same before refiners, where there is one
    layer_errors    ||X W^T - X W'^T|| / ||X W^T|| on the first sample's leading tokens, by linear map
    histograms      counts of weights and scores before and after, from a few rows of each map (wandapp.histograms)
    kept_score      by map whose input channels were permuted: the fraction of its score that n:m keeps, before and after
    """

    name: str
    error: float = float("nan")
    error_before: float | None = None
    layer_errors: dict[str, float] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    kept_score: dict[str, tuple[float, float]] = field(default_factory=dict)
    permute_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    zeros: int = 0
    weights: int = 0
    tuned: bool = False  # whether end-to-end tuning has reached it


class BlockStore(Protocol):
    """What a method may ask of the dense model before the first block is pruned (wandapp.store.ModelStore)."""

    model: nn.Module
    prefix: str  # of the blocks' names
    linears: list[dict[str, LinearView]]  # of each block
    device: torch.device
    batch_size: int

    def __len__(self) -> int: ...

    def open_block(self, index: int) -> AbstractContextManager[DecoderBlock]: ...

    def loss_gradient(self, tokens: Tensor, hidden: Tensor) -> Tensor: ...


class Method:
    """A pruning method. One object prunes all blocks of a model, in order.

    Each rank sees the hidden states of its own samples; what is measured is that of all ranks, so all prune alike.
    """

    needs: frozenset[str] = frozenset()  # statistics it reads (wandapp.statistics)
    compensates = False  # whether it also changes the weights it keeps
    is_exact = True  # whether it removes as many weights as it is asked to

    def __init__(self, config: PruneConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks

    @property
    def outputs_read(self) -> int | None:
        """Leading samples whose dense outputs it reads; None: all."""
        return 1

    @property
    def follows_dense_path(self) -> bool:
        """Whether it reads the dense model's own states after each block."""
        return False

    @property
    def reads_samples(self) -> bool:
        """Whether more than the error probes depends on the calibration samples."""
        is_trained = bool(self.config.tune_passes)
        return bool(self.needs) or self.outputs_read is None or self.config.is_allocated or is_trained

    @property
    def scorer(self) -> "Method":
        """The method whose score chooses: itself, unless it wraps another."""
        return self

    def prepare(self, store: BlockStore, tokens: Tensor, hidden: Tensor) -> float:
        """Called once, on the dense model in `store`, before any block is pruned; returns the FLOPs it spent.

        tokens [samples, seq_len], hidden [samples, seq_len, hidden_size] the first block's inputs; this rank's samples
        """
        return 0.0

    def terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        """The score of one linear map."""
        raise NotImplementedError(f"{type(self).__name__} defines no score")

    def order_terms(self, view: LinearView, measured: Measurements) -> ScoreTerms:
        """Terms of the score by which channels are put in order, before anything is pruned: those of the choice."""
        return self.terms(view, measured)

    def apply(self, block: DecoderBlock, measured: Measurements, pattern: SparsityPattern, record: BlockRecord) -> None:
        """Prunes every linear map of the block in place."""
        for view in block.linears.values():
            self.prune_linear_(view, view.weight, self.checked_terms(view, measured, record), pattern)

    def prune_block(
        self, block: DecoderBlock, hidden: Tensor, pattern: SparsityPattern, dense_path: Tensor | None = None
    ) -> BlockRecord:
        """Measures the dense block on hidden [samples, seq_len, hidden_size] and prunes it in place.

        dense_path   states after this block in the dense model, shaped as hidden, for a method that follows them
        """
        record = BlockRecord(block.name)
        measured = measure(
            block, hidden, self.needs, self.ranks, outputs=self.outputs_read, loss=self.config.regional_loss
        )
        if self.config.permute:
            self.permute(block, hidden, measured, pattern, record)
        measured.dense_path = dense_path
        dense, histograms = probe_products(block, measured), BlockHistograms(block)
        self.transform(block, hidden, measured, pattern, record)
        histograms.score(lambda view: self.scorer.checked_terms(view, measured, BlockRecord(block.name)))
        record.layer_errors = layer_errors(block, measured, dense, self.ranks)
        record.histograms = histograms.close()
        return record

    def targets(self, measured: Measurements) -> Tensor:
        """[samples, seq_len, hidden_size] what the block's outputs are measured against: the dense block's on its inputs."""
        return measured.outputs

    def permute(
        self, block: DecoderBlock, hidden: Tensor, measured: Measurements, pattern: SparsityPattern, record: BlockRecord
    ) -> None:
        """Lets channels of the dense block, and what was measured of it, change places for the scorer's sake."""
        if not pattern.is_structured:
            if block.index == 0:
                record.warnings.append(f"permute: whole rows choose at {pattern}, so no order of channels is better")
            return
        from wandapp.permutation import permute_channels  # with its solver and kernel, for those who ask for it

        done = permute_channels(block, hidden, measured, pattern, lambda view: self.score(view, measured), self.ranks)
        record.kept_score, record.permute_seconds = done.kept, done.seconds
        for reason in dict.fromkeys(done.skipped.values()):
            names = [name for name, why in done.skipped.items() if why == reason]
            record.warnings.append(
                f"{names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") + f": not permuted, {reason}"
            )

    def score(self, view: LinearView, measured: Measurements) -> Tensor:
        """[out_features, in_features] fp32: by what channels are put in order, from the map's weights as they stand."""
        is_unseen = view.is_expert and self.scorer.needs and not measured.tokens.get(view.name)
        scale, gradient, alpha = ScoreTerms() if is_unseen else self.scorer.order_terms(view, measured)
        score = view.weight.float().abs()
        if gradient is not None:
            return score.mul_(alpha * gradient + (1.0 if scale is None else scale))
        return score if scale is None else score.mul_(scale)

    def transform(
        self, block: DecoderBlock, hidden: Tensor, measured: Measurements, pattern: SparsityPattern, record: BlockRecord
    ) -> None:
        """Prunes the block in place and notes its error on the leading samples whose dense outputs were kept."""
        self.apply(block, measured, pattern, record)
        probe = measured.outputs[: measured.share.leading(ERROR_SAMPLES)]
        record.error = block_error(block, hidden, probe, self.ranks)

    def checked_terms(self, view: LinearView, measured: Measurements, record: BlockRecord) -> ScoreTerms:
        """The terms of a map, or magnitude's, with a warning, for an expert that no calibration token reached."""
        if view.is_expert and self.needs and not measured.tokens.get(view.name):
            record.warnings.append(f"{view.name}: no calibration token reached this expert; pruned by magnitude alone")
            return ScoreTerms()
        return self.terms(view, measured)

    def prune_linear_(self, view: LinearView, weight: Tensor, terms: ScoreTerms, pattern: SparsityPattern) -> None:
        """Zeroes in place the lowest scores of weight [out, in], the map's own or a master copy of it."""
        target = weight.contiguous()
        with scores_of(view.name):
            self.select_(target, terms, pattern.at(view.name))
        if target.data_ptr() != weight.data_ptr():
            weight.copy_(target)

    def select_(self, weight: Tensor, terms: ScoreTerms, pattern: SparsityPattern) -> None:
        """The choice itself: n of every m, or an exact number per row."""
        if pattern.is_structured:
            prune_nm_(weight, terms.column_scale, terms.gradient, n=pattern.n, m=pattern.m, alpha=terms.alpha)
        else:
            for rows, keep in rows_to_keep(weight, pattern):
                gradient = None if terms.gradient is None else terms.gradient[rows]
                with scores_from(row=rows.start):
                    prune_rows_(weight[rows], terms.column_scale, gradient, keep=keep, alpha=terms.alpha)


@contextmanager
def scores_of(name: str) -> Iterator[None]:
    """Puts the linear map's name in front of the message on scores that leave no choice."""
    try:
        yield
    except (NonFiniteScoreError, UnreachableSparsityError) as error:
        raise WandappError(f"{name}: {error}") from None


@contextmanager
def scores_from(row: int = 0, column: int = 0) -> Iterator[None]:
    """Tells the place in the map of a score that is NaN or Inf, where a choice reads the part that begins at (row, column)."""
    try:
        yield
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(row + error.row, column + error.column) from None


@contextmanager
def as_one_row(weight: Tensor) -> Iterator[None]:
    """The same where a choice reads weight [out, in] as one row."""
    try:
        yield
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(*divmod(error.column, weight.shape[1])) from None


def rows_to_keep(weight: Tensor, pattern: SparsityPattern) -> list[tuple[slice, int]]:
    """(rows, weights that each of them keeps): all alike, but for counted zeros that the rows of [out, in] do not divide.

    The last rows lose one weight more then.
    """
    rows, columns = weight.shape
    removed, last = divmod(pattern.zeros(rows, columns), max(rows, 1))
    parts = [(slice(0, rows - last), columns - removed), (slice(rows - last, rows), columns - removed - 1)]
    return parts if last else parts[:1]


def probe_products(block: DecoderBlock, measured: Measurements) -> dict[str, Tensor]:
    """X W^T of every linear map on its probe rows, [tokens, out_features]."""
    return {name: x @ block.linears[name].weight.T for name, x in measured.probes.items()}


def layer_errors(
    block: DecoderBlock, measured: Measurements, dense: dict[str, Tensor], ranks: Ranks
) -> dict[str, float]:
    """Relative error of every linear map's product on its probe rows, given the dense products; the first rank's counts."""
    pruned = probe_products(block, measured)
    own = {name: relative_error(pruned[name], dense[name]) for name in dense}
    return {name: error for errors in reversed(ranks.gather(own)) for name, error in errors.items()}


@torch.no_grad()
def block_error(
    block: DecoderBlock,
    hidden: Tensor,
    dense: Tensor,
    ranks: Ranks,
    kind: str = "frobenius",
    until: str | None = None,
) -> float:
    """Relative error of the block's outputs, over the leading samples whose dense [samples, ...] outputs the ranks hold.

    until   the error of this linear map's products instead

    sqrt(sum output_error / sum of squares of the dense outputs), for kind "token" each token of both divided by its RMS
    """
    batch_size = 1 if 1 in block.calls else None
    device = next(block.module.parameters()).device  # states may live elsewhere
    squares = torch.zeros(2, dtype=torch.float64, device=device)  # of the difference, of the dense outputs
    for rows in block.batches(len(dense), batch_size):
        target = dense[rows].to(device)
        pair = torch.stack(
            [output_error(block(hidden[rows], until), target, kind), _normalised(target, target, kind).square()]
        )
        squares += pair.flatten(1).sum(dim=1, dtype=torch.float64)
    difference, reference = ranks.sum_(squares).sqrt().tolist()
    return difference / max(reference, 1e-30)


def output_error(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Squared error [..., hidden_size] fp32 of a block's outputs; "token": each token's error divided by its target's RMS."""
    target = target.to(output.device)
    return _normalised(output.float() - target.float(), target, kind).square()


def _normalised(states: Tensor, target: Tensor, kind: str) -> Tensor:
    return states.float() if kind == "frobenius" else states.float() / token_rms(target)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in fp32; 0 where both vanish."""
    difference = torch.linalg.vector_norm((value - reference).float())
    return (difference / torch.linalg.vector_norm(reference.float()).clamp_min(1e-30)).item()
