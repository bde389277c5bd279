"""The calls that `wandapp bench kernels` times: every op on one weight, and the torch operations that it replaces."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from wandapp.kernels.column_sumsq import column_sumsq
from wandapp.kernels.compensate import compensate_block_
from wandapp.kernels.max_sum import pairwise_max_sum
from wandapp.kernels.pack import pack, unpack
from wandapp.kernels.rmsprop import rmsprop_
from wandapp.kernels.select import prune_nm_, prune_pack_nm_, prune_rows_, select_nm, select_rows
from wandapp.kernels.sparse_linear import sparse_linear
from wandapp.layer_shapes import Shape

TORCH = "torch"  # in the place of a backend: the torch operations that an op replaces
TOKENS = (1, 4, 16, 64)  # of the products
STATISTICS_TOKENS = 4096  # of column_sumsq
BLOCK_COLUMNS = 128  # of compensate_block_
DEALT_GROUPS = 512  # of pairwise_max_sum


class Case(NamedTuple):
    """One call to time. `bytes_moved`: the fewest it must read and write. `restore` runs before it, untimed."""

    op: str
    backend: str
    bytes_moved: float
    run: Callable[[], object]
    restore: Callable[[], object] | None = None


class Inputs:
    """A random weight [rows, cols], a copy to prune, and a scale for each column."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.rows, self.cols = shape
        self.dtype, self.device = dtype, device
        self.dense = torch.randn(shape, device=device).to(dtype)
        self.weight, self.scale = self.dense.clone(), torch.rand(self.cols, device=device) + 0.5
        self.count, self.itemsize = self.dense.numel(), self.dense.element_size()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def pruned(self, pattern: tuple[int, int] | None) -> Tensor:
        """`dense` with n of every m, or half of every row."""
        weight = self.dense.clone()
        if pattern:
            prune_nm_(weight, n=pattern[0], m=pattern[1])
        else:
            prune_rows_(weight, keep=self.cols // 2)
        return weight

    def restore(self) -> None:
        self.weight.copy_(self.dense)


Backends = Callable[[str], list[str]]  # those of a function that are to be timed here


def selection(of: Inputs, backends: Backends) -> list[Case]:
    """Masks from a dense weight, and pruning in place."""
    size, scale, half = of.count * of.itemsize, of.scale, of.cols // 2
    masked, in_place = size + of.count, 2 * size + of.count / 8
    found = [
        Case("select_nm 2:4", TORCH, masked, lambda: torch_nm(of.dense, scale, 2, 4)),
        Case("select_rows 50%", TORCH, masked, lambda: torch_rows(of.dense, scale, half)),
        Case("prune_nm_ 2:4", TORCH, in_place, lambda: zero(of.weight, torch_nm(of.weight, scale, 2, 4)), of.restore),
        Case(
            "prune_rows_ 50%", TORCH, in_place, lambda: zero(of.weight, torch_rows(of.weight, scale, half)), of.restore
        ),
    ]
    for b in backends("select_nm"):
        found += [
            Case("select_nm 2:4", b, masked, lambda b=b: select_nm(of.dense, scale, n=2, m=4, backend=b)),
            Case("select_nm 4:8", b, masked, lambda b=b: select_nm(of.dense, scale, n=4, m=8, backend=b)),
            Case("select_rows 50%", b, masked, lambda b=b: select_rows(of.dense, scale, keep=half, backend=b)),
        ]
        pruning = {
            "prune_nm_ 2:4": lambda b=b: prune_nm_(of.weight, scale, n=2, m=4, backend=b),
            "prune_nm_ 4:8": lambda b=b: prune_nm_(of.weight, scale, n=4, m=8, backend=b),
            "prune_rows_ 50%": lambda b=b: prune_rows_(of.weight, scale, keep=half, backend=b),
            "prune_rows_ 50%, one row": lambda b=b: prune_rows_(of.weight.view(1, -1), keep=of.count // 2, backend=b),
        }
        found += [Case(op, b, in_place, run, of.restore) for op, run in pruning.items()]
    return found


def packing(of: Inputs, backends: Backends) -> list[Case]:
    """To the packed form and back, each into fresh memory, as `clone` is; the torch operations are the reference's."""
    groups, rows = of.pruned((2, 4)), of.pruned(None)
    packed_groups, packed_rows = pack(groups, n=2, m=4), pack(rows)
    size, scale = of.count * of.itemsize, of.scale
    moved, fused = 1.5 * size + of.count / 8, 2.5 * size + of.count / 8

    def apart(backend: str) -> None:
        prune_nm_(of.weight, scale, n=2, m=4, backend=backend)
        pack(of.weight, n=2, m=4, backend=backend)

    found = [Case("clone of W", TORCH, 2 * size, of.dense.clone)]
    for b in ("reference", *backends("pack")):
        name = TORCH if b == "reference" else b
        found += [
            Case("pack 2:4", name, moved, lambda b=b: pack(groups, n=2, m=4, backend=b)),
            Case("pack 50%", name, moved + size, lambda b=b: pack(rows, backend=b)),  # W is read twice
        ]
        if b != "cuda":  # which has no unpack
            found += [
                Case("unpack 2:4", name, moved, lambda b=b: unpack(packed_groups, backend=b)),
                Case("unpack 50%", name, moved, lambda b=b: unpack(packed_rows, backend=b)),
            ]
    for b in backends("prune_pack_nm_"):
        run = lambda b=b: prune_pack_nm_(of.weight, scale, n=2, m=4, backend=b)  # noqa: E731
        found += [
            Case("prune_nm_, then pack 2:4", b, fused + 2 * size, partial(apart, b), of.restore),
            Case("prune_pack_nm_ 2:4", b, fused, run, of.restore),
        ]
    return found


def products(of: Inputs, backends: Backends) -> list[Case]:
    """x W^T for few tokens. On a CPU torch's 16-bit products are slow: the fp32 one stands beside them."""
    packed = {"2:4": pack(of.pruned((2, 4)), n=2, m=4), "50%": pack(of.pruned(None))}
    size, dense32 = of.count * of.itemsize, of.dense.float()
    found = []
    for tokens in TOKENS:
        op, x = f"x W^T, {tokens} token{'s' if tokens > 1 else ''}", of.random(tokens, of.cols)
        found.append(Case(op, TORCH, size, lambda x=x: linear(x, of.dense)))
        if of.device.type == "cpu" and of.dtype != torch.float32:
            found.append(Case(op, "torch fp32", 4 * of.count, lambda x=x: linear(x.float(), dense32)))
        if of.device.type == "cpu" and tokens == 1 and of.cols % 64 == 0:
            found.append(Case(op, "cpu dense", size, lambda x=x: dense_product(x, of.dense)))
        for pattern, weight in packed.items():
            moved = size / 2 + of.count / 8
            for b in backends("sparse_linear"):
                run = lambda x=x, weight=weight, b=b: sparse_linear(x, weight, backend=b)  # noqa: E731
                found.append(Case(op, f"{b} {pattern}", moved, run))
    return found


def statistics(of: Inputs, backends: Backends) -> list[Case]:
    """Sums of squares of a layer's inputs, and one optimiser step on its fp32 master weight."""
    x, gradient = of.random(STATISTICS_TOKENS, of.cols), of.dense
    master, mean_square = of.dense.float(), torch.rand(of.rows, of.cols, device=of.device)
    op, step = f"column_sumsq, {STATISTICS_TOKENS} tokens", of.count * (16 + of.itemsize)
    found = [
        Case(op, TORCH, x.nbytes, lambda: x.float().square().sum(0)),
        Case("rmsprop_", TORCH, step, lambda: rmsprop_(master, gradient, mean_square, lr=1e-6, backend="reference")),
    ]
    for b in backends("column_sumsq"):
        found.append(Case(op, b, x.nbytes, lambda b=b: column_sumsq(x, backend=b)))
        run = lambda b=b: rmsprop_(master, gradient, mean_square, lr=1e-6, backend=b)  # noqa: E731
        found.append(Case("rmsprop_", b, step, run))
    return found


def compensation(of: Inputs, backends: Backends) -> list[Case]:
    """SparseGPT's block of 128 columns, fp32 whatever the weight is stored as; torch: the reference's loop."""
    weight = torch.randn(of.rows, BLOCK_COLUMNS, device=of.device)
    factor = torch.randn(BLOCK_COLUMNS, BLOCK_COLUMNS, device=of.device).triu() * 0.01
    factor.diagonal().add_(1)
    moved, work = 13 * weight.numel(), weight.clone()
    restore = lambda: work.copy_(weight)  # noqa: E731
    return [
        Case("compensate_block_ 2:4", TORCH if b == "reference" else b, moved,
             lambda b=b: compensate_block_(work, factor, n=2, m=4, backend=b), restore)
        for b in ("reference", *backends("compensate_block_"))
    ]  # fmt: skip


def exchange(of: Inputs, backends: Backends) -> list[Case]:
    """What every exchange of a channel among DEALT_GROUPS groups is worth. Bound by arithmetic, not by memory."""
    left, right = (torch.rand(DEALT_GROUPS, of.rows, device=of.device) for _ in range(2))
    moved, op = left.nbytes + right.nbytes + 4 * DEALT_GROUPS**2, f"pairwise_max_sum, {DEALT_GROUPS} groups"
    return [
        Case(op, TORCH if b == "reference" else b, moved, lambda b=b: pairwise_max_sum(left, right, backend=b))
        for b in ("reference", *backends("pairwise_max_sum"))
    ]


GROUPS = {group.__name__: group for group in (selection, packing, products, statistics, compensation, exchange)}


def torch_nm(weight: Tensor, scale: Tensor, n: int, m: int) -> Tensor:
    """Mask of n:m by topk and scatter, as public pruning code has it."""
    score = (weight.abs() * scale.to(weight.dtype)).view(-1, m)
    chosen = score.topk(n, sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True).view(weight.shape)


def torch_rows(weight: Tensor, scale: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest of every row by sort and scatter, as Wanda's authors have it."""
    order = (weight.abs() * scale.to(weight.dtype)).sort(dim=-1, stable=True).indices
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, order[:, : weight.shape[1] - keep], False)


def zero(weight: Tensor, mask: Tensor) -> None:
    weight[~mask] = 0


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    from wandapp.kernels.sparse_linear.cpu import dense_linear_of_token_cpu

    return dense_linear_of_token_cpu(x, weight, None)
