"""How a fraction of zeros is spread over blocks, before any is pruned: those that suffer more stay denser.

owl (arXiv:2310.05175), from Wanda's scores A_ij = |W_ij| s_j of the dense model:

    D_l = share of block l's scores above M * their mean        d_l = (D_l - min D) / (max D - min D)
    sparsity_l = S - 2 lambda (d_l - mean d)

error: each block, pruned by Wanda's score to S - lambda and to S + lambda, gives two errors (||f - f_pruned|| / ||f||)^2, tokens
brought to equal size; between them log error is taken as linear in the sparsity s, log e_l(s) = a_l + b_l s, and

    minimise  sum_l e_l(s_l)  with the whole model's sparsity fixed and |s_l - S| <= lambda

Either way exactly int(S * weights) weights of all maps together are removed: a map loses the integer part of its block's
share, and what is left goes to the largest fractions, one each. A map's zeros are dealt to its rows as evenly as can be.
Differs from the paper: the leading SAMPLES samples serve; mean d counts each block by its weights.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wandapp.blocks import DecoderBlock
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.errors import WandappError
from wandapp.methods.base import BlockRecord, BlockStore, Method, block_error
from wandapp.methods.refiner import Snapshot, linear_parameters
from wandapp.methods.wanda import Wanda
from wandapp.pattern import AllocatedPattern, SparsityPattern
from wandapp.statistics import Measurements, measure

SAMPLES = 16  # of all ranks; rounded to whole batches
BISECTIONS = 200  # halvings: to the last bit of a double


class Allocation(NamedTuple):
    """The pattern with each map's zeros, the sparsity of every block by name, and the FLOPs spent on them."""

    pattern: SparsityPattern
    sparsities: dict[str, float]
    flops: float


def allocate(store: BlockStore, method: Method, config: PruneConfig, hidden: Tensor) -> Allocation:
    """Each block's sparsity, from the dense blocks in `store`; hidden [samples, seq_len, hidden_size], this rank's samples.

    Costs a forward of SAMPLES samples, with "error" two more; nothing in `store` or `hidden` is changed. Blocks of which
    nothing is pruned have no part in it.
    """
    target, flops = config.pattern.sparsity, 0.0
    hidden = _leading(hidden, store.batch_size, method.ranks)
    assert config.allocate is not None  # the preset's, if nobody gave any
    read, spread = RULES[config.allocate]
    sensitivities, names = [], []
    for index, linears in enumerate(store.linears):
        with store.open_block(index) as block:
            measured = measure(block, hidden, frozenset({"column_norm"}), method.ranks)
            if linears:  # else all of the block stays dense
                sensitivities.append(read(block, hidden, measured, config, method.ranks))
                names.append(block.name)
            hidden = measured.outputs
            flops += block.flops
    shapes = [{view.name: view.weight.numel() for view in linears.values()} for linears in store.linears if linears]
    weights = [sum(sizes.values()) for sizes in shapes]
    sparsities = spread(sensitivities, weights, target, config.allocate_spread)
    return Allocation(counted(target, shapes, sparsities), dict(zip(names, sparsities, strict=True)), flops)


def _leading(hidden: Tensor, batch_size: int, ranks: Ranks) -> Tensor:
    """This rank's part of the first SAMPLES samples, in batches whose calls were recorded."""
    count = ranks.share(len(hidden)).leading(max(SAMPLES // batch_size, 1) * batch_size)
    return hidden[: count if count == len(hidden) else count // batch_size * batch_size]


def outlier_ratio(
    block: DecoderBlock, hidden: Tensor, measured: Measurements, config: PruneConfig, ranks: Ranks
) -> float:
    """D_l of the dense block: the share of Wanda's scores, over all its maps, above owl_outlier times their mean."""
    scores = [view.weight.float().abs() * measured.column_norm(view) for view in _met(block, measured)]
    count = max(sum(score.numel() for score in scores), 1)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    if not math.isfinite(mean):
        raise WandappError(f"{block.name}: scores are NaN or Inf, so outliers cannot be counted; use a wider --dtype")
    return sum(int((score > config.owl_outlier * mean).sum()) for score in scores) / count


def pruned_errors(
    block: DecoderBlock, hidden: Tensor, measured: Measurements, config: PruneConfig, ranks: Ranks
) -> tuple[float, float]:
    """log e_l of the block at the lowest and the highest sparsity that it may get; the block stays dense."""
    wanda, dense = Wanda(config, ranks), Snapshot(linear_parameters(block))
    errors = []
    for sparsity in bounds(config.pattern.sparsity, config.allocate_spread):
        wanda.apply(block, measured, SparsityPattern(sparsity), BlockRecord(block.name))
        errors.append(block_error(block, hidden, measured.outputs, ranks, kind="token"))
        dense.restore()
    if not all(map(math.isfinite, errors)):
        raise WandappError(
            f"{block.name}: its outputs are NaN or Inf, so errors cannot be compared; use a wider --dtype"
        )
    low, high = (2 * math.log(max(error, 1e-12)) for error in errors)
    return low, high


def _met(block: DecoderBlock, measured: Measurements) -> Iterable:
    """The block's maps that a calibration token reached."""
    return (view for view in block.linears.values() if view.name in measured.norms)


def bounds(target: float, spread: float) -> tuple[float, float]:
    """target -+ spread, but no nearer to 0 and 1 than half of the target's distance."""
    return max(target - spread, target / 2), min(target + spread, (1 + target) / 2)


def owl_sparsities(ratios: Sequence[float], weights: Sequence[int], target: float, spread: float) -> list[float]:
    """Each block's sparsity by OWL's formula; ratios: D_l, weights: sizes of the blocks, spread: lambda.

    Where it leaves `bounds` of twice the spread it is cut, and all blocks are shifted to keep the target.
    """
    width = max(ratios) - min(ratios)
    denser = [2 * spread * (ratio - min(ratios)) / width if width else 0.0 for ratio in ratios]
    low, high = bounds(target, 2 * spread)
    return _balanced(
        lambda shift: [min(max(shift - d, low), high) for d in denser], low, high + 2 * spread, weights, target
    )


def error_sparsities(
    log_errors: Sequence[tuple[float, float]], weights: Sequence[int], target: float, spread: float
) -> list[float]:
    """Each block's sparsity that minimises the sum of errors; log_errors: log e_l at both ends of `bounds`.

    There the marginal errors b_l e_l(s_l) / weights_l of all blocks are equal, or the block is at an end.
    """
    low, high = bounds(target, spread)
    slopes = [max((upper - lower) / (high - low), 1e-3) for lower, upper in log_errors]
    # log of the marginal error is c_l + b_l s
    offsets = [
        math.log(slope) + lower - slope * low - math.log(size)
        for (lower, _), slope, size in zip(log_errors, slopes, weights, strict=True)
    ]

    def at(level: float) -> list[float]:
        return [min(max((level - c) / b, low), high) for c, b in zip(offsets, slopes, strict=True)]

    ends = [c + b * end for c, b in zip(offsets, slopes, strict=True) for end in (low, high)]
    return _balanced(at, min(ends), max(ends), weights, target)


def _balanced(
    sparsities_at: Callable[[float], list[float]], low: float, high: float, weights: Sequence[int], target: float
) -> list[float]:
    """sparsities_at(x), which grows with x, at the x in [low, high] where the weighted mean meets the target."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean = sum(s * size for s, size in zip(sparsities_at(middle), weights, strict=True)) / sum(weights)
        low, high = (middle, high) if mean < target else (low, middle)
    return sparsities_at(high)


def counted(target: float, sizes: Sequence[dict[str, int]], sparsities: Sequence[float]) -> AllocatedPattern:
    """The pattern that removes int(target * all weights); sizes: weights of each block's maps by name."""
    weights = {name: size for block in sizes for name, size in block.items()}
    shares = {name: size * s for block, s in zip(sizes, sparsities, strict=True) for name, size in block.items()}
    zeros = {name: int(share) for name, share in shares.items()}
    missing = int(target * sum(weights.values())) - sum(zeros.values())
    step = 1 if missing >= 0 else -1
    by_fraction = sorted(shares, key=lambda name: step * (int(shares[name]) - shares[name]))  # ties: the earlier map
    while missing:
        for name in by_fraction:
            if missing and 0 <= zeros[name] + step <= weights[name]:
                zeros[name], missing = zeros[name] + step, missing - step
    return AllocatedPattern(target, zeros_by_map=zeros, weights_by_map=weights)


RULES: dict[
    str, tuple[Callable, Callable[..., list[float]]]
] = {  # what is read of each block, and what follows from it
    "owl": (outlier_ratio, owl_sparsities),
    "error": (pruned_errors, error_sparsities),
}
