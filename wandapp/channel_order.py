"""The order of a weight's input channels in which an n:m choice keeps the most score.

    maximise over orders p    sum_i sum_g top_n { S_i,p(c) : places c of group g }

top_n is the sum of the n largest, i an output row, g the groups of m consecutive places. The objective is that of Pool and Yu
("Channel permutations for N:M sparsity", NeurIPS 2021) for any score; the search follows the refinement of
Plug-and-Play (ICLR 2024): every group gives up one channel, and a linear sum assignment deals these out anew. With t_gi the
n-th largest score of row i among the m - 1 channels that stay in group g, channel c brings the group

    sum_i max(t_gi, S_ic)    up to a term that does not depend on c

so each deal is worth exactly what the assignment says, and the kept score only rises. How groups follow each other does not
matter to that score; the strongest come first, because methods that go from left to right and let later columns make up for
earlier ones (SparseGPT) then remove the most while the most is left to make up for it.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from wandapp import _C
from wandapp.errors import WandappError
from wandapp.kernels.max_sum import pairwise_max_sum

PART = 256  # groups that deal among themselves; more are cut into parts, each time anew. 512: 3 % more gain, four times the time
MAX_ROUNDS = 8  # in a round every channel is dealt once
LEAST_GAIN = 2e-4  # of the kept score: after two rounds in a row that gain less the search ends


class Order(NamedTuple):
    """Place c takes channel channels[c]; the score that n:m keeps in the given order, in this one, and the score of all."""

    channels: Tensor
    kept_before: float
    kept: float
    total: float


def best_order(score: Tensor, *, n: int, m: int) -> Order:
    """An order in which n:m keeps more score, or as much, the strongest groups first. Equal inputs give equal orders.

    score  [channels, rows] fp32, finite, >= 0: column i holds row i of the weight's scores; channels divisible by m
    """
    groups = torch.arange(len(score)).view(-1, m)  # [groups, m], the channels of each
    before, total = kept_score(score, groups, n), score.sum(dtype=torch.float64).item()
    if n == m or len(groups) == 1:
        return Order(groups.flatten(), before, before, total)
    best, kept = groups, before
    generator = torch.Generator().manual_seed(len(score))
    groups, idle = spread(score, m), 0
    for _ in range(MAX_ROUNDS):
        seats = torch.rand(groups.shape, generator=generator).argsort(
            dim=1
        )  # who meets whom at a place is left to chance
        groups = groups.gather(1, seats)
        for place in range(m):
            _deal_(groups, score, place, n, torch.randperm(len(groups), generator=generator).split(PART))
        reached = kept_score(score, groups, n)
        idle = idle + 1 if reached <= kept * (1 + LEAST_GAIN) else 0
        if reached > kept:
            best, kept = groups.clone(), reached
        if idle == 2:
            break
    best = best[_mass(score)[best].sum(dim=1).argsort(descending=True, stable=True)]
    return Order(best.flatten(), before, kept_score(score, best, n), total)


def spread(score: Tensor, m: int) -> Tensor:
    """Groups [channels / m, m] dealt like cards from the strongest channel to the weakest, so that no two strong ones meet."""
    return _mass(score).argsort(descending=True, stable=True).view(m, -1).T.contiguous()


def _mass(score: Tensor) -> Tensor:
    """[channels] fp64 on the CPU, each channel's score."""
    return score.sum(dim=1, dtype=torch.float64).cpu()


def kept_score(score: Tensor, groups: Tensor, n: int) -> float:
    """What the n largest of every group and row sum to, in fp64; a part of the groups at a time, which caches hold."""
    kept = 0.0
    for part in groups.split(PART):
        largest = _largest([score[channels] for channels in part.T], n)
        kept += sum(values.sum(dtype=torch.float64).item() for values in largest)
    return kept


def _deal_(groups: Tensor, score: Tensor, place: int, n: int, parts: tuple[Tensor, ...]) -> None:
    """Deals the channels at `place` anew among the groups of each part, for the largest kept score."""
    gains = (_gain(score, groups[part], place, n) for part in parts)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part, taken in zip(parts, pool.map(assignment, gains), strict=True):
            groups[part, place] = groups[part[taken], place]


def _gain(score: Tensor, groups: Tensor, place: int, n: int) -> Tensor:
    """[groups, groups] what each group's score is, up to its own term, with each of the channels at `place`."""
    stay = [score[groups[:, other]] for other in range(groups.shape[1]) if other != place]
    return pairwise_max_sum(_largest(stay, n)[-1], score[groups[:, place]])


def assignment(gain: Tensor) -> Tensor:
    """[size] int64 on the CPU: the column each row takes, every column once, so that the sum of gain [size, size] is largest.

    raises  WandappError on a gain that is NaN or Inf
    """
    gain = gain.to("cpu", torch.float32).contiguous()
    if not gain.isfinite().all():
        raise WandappError("channels cannot be put in order by scores that are not finite; use a wider --dtype")
    taken = torch.empty(len(gain), dtype=torch.int64)
    _C.assign(gain.data_ptr(), len(gain), taken.data_ptr())
    return taken


def _largest(tensors: list[Tensor], n: int) -> list[Tensor]:
    """Element by element the n largest of at least n tensors, largest first; a few passes where a sort takes many."""
    largest: list[Tensor] = []
    for value in tensors:
        for rank, held in enumerate(largest):
            largest[rank], value = torch.maximum(held, value), torch.minimum(held, value)
        if len(largest) < n:
            largest.append(value)
    return largest
