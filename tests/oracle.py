"""The equations of the pruning methods, in float64, written without sight of the library: plain torch, loops welcome.

A block's inputs are found by running the model's own forward from the token ids, once per sample, with the blocks
before it in whatever state they are; so whoever prunes block after block gets the inputs the pruned path gives.
`matrices` and `layer_inputs` present every linear map as [out_features, in_features] and [tokens, in_features].

Symbols: W weight, S score, s column_scale, G gradient, N samples, X_n the block input of sample n, f_l the block.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCK_LISTS = {
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}  # every other family: model.layers


class KeepDouble(TorchFunctionMode):
    """Inside, whatever asks for float32 gets float64: norms, softmax and rotary angles cast to float32 by name."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in float64, in eval mode, with every parameter asking for a gradient."""
    model = copy.deepcopy(model)
    model.set_experts_implementation("eager")  # the grouped product does not know float64
    return model.double().eval().requires_grad_(True)


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, by what is known of the family."""
    return model.get_submodule(BLOCK_LISTS.get(model.config.model_type, "model.layers"))


class Call(NamedTuple):
    """How the model calls a block for one sample."""

    args: tuple
    kwargs: dict


def block_calls(model: nn.Module, block: nn.Module, tokens: Tensor) -> list[Call]:
    """The call of `block` for every row of `tokens`, recorded in a forward of the whole model."""
    calls = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True)
    with KeepDouble(), torch.no_grad():
        for row in tokens:
            model(input_ids=row[None], use_cache=False)
    hook.remove()
    return calls


def block_output(block: nn.Module, call: Call) -> Tensor:
    """f_l(X_n)  [1, tokens, hidden]."""
    with KeepDouble():
        output = block(*call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Matrix:
    """One linear map; `weight` and `gradient` are [out_features, in_features] views, so writing to them works."""

    module: nn.Module
    field: str = "weight"
    expert: int | None = None
    is_transposed: bool = False

    def view(self, stored: Tensor) -> Tensor:
        stored = stored if self.expert is None else stored[self.expert]
        return stored.T if self.is_transposed else stored

    @property
    def weight(self) -> Tensor:
        return self.view(getattr(self.module, self.field).data)

    @property
    def gradient(self) -> Tensor:
        return self.view(getattr(self.module, self.field).grad)


def is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith("TopKRouter")


def is_experts(module: nn.Module) -> bool:
    return hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter)


def matrices(block: nn.Module) -> dict[str, Matrix]:
    """Every linear map of the block by name; an expert's is `<module>.<field>.<expert>`."""
    found = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or is_router(module):
            found[name] = Matrix(module)
        elif type(module).__name__ == "Conv1D":  # GPT-2 stores [in, out]
            found[name] = Matrix(module, is_transposed=True)
        elif is_experts(module):  # [experts, out, in]
            for field in ("gate_up_proj", "down_proj"):
                for expert in range(len(getattr(module, field))):
                    found[f"{name}.{field}.{expert}"] = Matrix(module, field, expert)
    return found


@contextmanager
def recorded_inputs(block: nn.Module):
    """While open, fills the yielded dict name -> [tokens, in_features] with the inputs of the latest forward."""
    inputs = {}

    def record(name):
        def hook(module, args):
            x = args[0].detach()
            inputs[name] = x.reshape(-1, x.shape[-1])

        return hook

    def record_experts(name):
        def hook(module, args):
            hidden, chosen, _ = (arg.detach() for arg in args)
            for expert in range(len(module.gate_up_proj)):
                x = hidden[(chosen == expert).any(dim=-1)]  # [tokens of this expert, hidden]
                gate, up = (x @ module.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
                inputs[f"{name}.gate_up_proj.{expert}"] = x
                inputs[f"{name}.down_proj.{expert}"] = module.act_fn(gate) * up

        return hook

    hooks = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or is_router(module) or type(module).__name__ == "Conv1D":
            hooks.append(module.register_forward_pre_hook(record(name)))
        elif is_experts(module):
            hooks.append(module.register_forward_pre_hook(record_experts(name)))
    yield inputs
    for hook in hooks:
        hook.remove()


def layer_inputs(block: nn.Module, calls: list[Call]) -> list[dict[str, Tensor]]:
    """For every sample the inputs of every linear map of the block as it is now."""
    per_sample = []
    with recorded_inputs(block) as inputs, torch.no_grad():
        for call in calls:
            block_output(block, call)
            per_sample.append(dict(inputs))
    return per_sample


def column_norms(inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """s_j = sqrt( (1/N) * sum_n sum_t X_n[t,j]^2 )."""
    return {
        name: torch.sqrt(sum((sample[name] ** 2).sum(dim=0) for sample in inputs) / len(inputs)) for name in inputs[0]
    }


def hessians(inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """H = (2/N) * sum_n X_n^T X_n."""
    return {name: 2 / len(inputs) * sum(sample[name].T @ sample[name] for sample in inputs) for name in inputs[0]}


def token_rms(hidden: Tensor) -> Tensor:
    """Root mean square of each token's state [..., 1], a constant to gradients."""
    return (hidden.detach() ** 2).mean(dim=-1, keepdim=True).sqrt()


def regional_loss(block: nn.Module, call: Call, *, per_token: bool = False) -> Tensor:
    """L(X_n) = || f_l(X_n) ||, the Frobenius norm of the block's output; per_token: each token divided by its RMS."""
    output = block_output(block, call)
    if per_token:
        output = output / token_rms(output)
    return (output**2).sum().sqrt()


def causal_loss(model: nn.Module, row: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first given those before it."""
    with KeepDouble():
        logits = model(input_ids=row[None], use_cache=False).logits[0]
    return -logits[:-1].log_softmax(dim=-1).gather(1, row[1:, None]).mean()


def gradient_per_sample(named: dict[str, Matrix], losses: list[Callable[[], Tensor]]) -> dict[str, list[Tensor]]:
    """name -> one gradient of each loss, by autograd."""
    gradients = {name: [] for name in named}
    for loss in losses:
        for matrix in named.values():
            matrix.module.zero_grad()
        loss().backward()
        for name, matrix in named.items():
            gradients[name].append(matrix.gradient.clone())
    return gradients


def root_mean_square(gradients: list[Tensor]) -> Tensor:
    """G = sqrt( (1/N) * sum_n g_n^2 )."""
    return torch.sqrt(sum(g**2 for g in gradients) / len(gradients))


def mean_absolute(gradients: list[Tensor]) -> Tensor:
    """G = (1/N) * sum_n |g_n|."""
    return sum(g.abs() for g in gradients) / len(gradients)


def regional_gradients(block: nn.Module, calls: list[Call], *, per_token: bool = False) -> dict[str, Tensor]:
    """G of every linear map of the block as it is now, RMS over samples."""
    losses = [lambda call=call: regional_loss(block, call, per_token=per_token) for call in calls]
    return {name: root_mean_square(g) for name, g in gradient_per_sample(matrices(block), losses).items()}


def model_gradients(model: nn.Module, tokens: Tensor, reduce: Callable) -> list[dict[str, Tensor]]:
    """For every block G of the model's loss, samples reduced by `root_mean_square` or `mean_absolute`."""
    losses = [lambda row=row: causal_loss(model, row) for row in tokens]
    named = {(i, name): m for i, block in enumerate(decoder_blocks(model)) for name, m in matrices(block).items()}
    per_block = [{} for _ in decoder_blocks(model)]
    for (i, name), gradients in gradient_per_sample(named, losses).items():
        per_block[i][name] = reduce(gradients)
    return per_block


def score(weight: Tensor, column_scale: Tensor | float = 1.0, gradient: Tensor | float = 0.0, alpha: float = 0.0):
    """S_ij = |W_ij| * (alpha * G_ij + s_j)."""
    return weight.abs() * (alpha * gradient + column_scale)


def keep_largest(groups: Tensor, kept: int) -> Tensor:
    """In every row of [groups, size] the `kept` largest; equal scores: the lower column."""
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[:, :kept], True)


def keep_nm(scores: Tensor, n: int, m: int) -> Tensor:
    """n of every m consecutive inputs."""
    return keep_largest(scores.reshape(-1, m), n).reshape(scores.shape)


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """All but int(in_features * sparsity) of every row."""
    return keep_largest(scores, scores.shape[1] - int(scores.shape[1] * sparsity))


def keep_matrix(scores: Tensor, sparsity: float) -> Tensor:
    """All but int(numel * sparsity) of the whole matrix."""
    return keep_largest(scores.reshape(1, -1), scores.numel() - int(scores.numel() * sparsity)).reshape(scores.shape)


def keep_cumulative(scores: Tensor, sparsity: float) -> Tensor:
    """Wanda's variant: per row remove the longest ascending prefix whose sum stays below beta * row total."""
    ascending, order = scores.sort(dim=-1, stable=True)
    low, beta, high = 0.0, 0.4, 0.8
    while True:
        removed = ascending.cumsum(dim=-1) < beta * scores.sum(dim=-1, keepdim=True)
        achieved = removed.double().mean().item()
        if abs(achieved - sparsity) <= 0.001 or high - low < 1e-9:
            return torch.ones_like(removed).scatter_(-1, order, ~removed)
        low, high = (low, beta) if achieved > sparsity else (beta, high)
        beta = (low + high) / 2


class Pattern(NamedTuple):
    """What to keep: n of every m, or (m = 0) all but the fraction `sparsity` of every row."""

    n: int
    m: int
    sparsity: float

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        if ":" in text:
            n, m = map(int, text.split(":"))
            return cls(n, m, 1 - n / m)
        return cls(0, 0, float(text))

    def keep(self, scores: Tensor) -> Tensor:
        return keep_nm(scores, self.n, self.m) if self.m else keep_rows(scores, self.sparsity)


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float = 0.01, width: int = 128):
    """(pruned and compensated weight, mask), column by column, by optimal brain surgery.

    The inverse Hessian of the columns not yet processed is kept explicitly; eliminating column j from it leaves
    [H_F]^-1 of the rest, so its diagonal at step j is U_jj^2 and its row j is U_jj * U_j of the Cholesky form.
    """
    weight, hessian, columns = weight.clone(), hessian.clone(), weight.shape[1]
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    hessian[dead, dead] = 1
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)

    inverse, pivot, row = torch.linalg.inv(hessian), torch.empty(columns, dtype=hessian.dtype), []
    for j in range(columns):
        pivot[j] = inverse[j, j]
        row.append(inverse[j] / pivot[j])
        inverse = inverse - pivot[j] * torch.outer(row[j], row[j])

    keep = torch.ones_like(weight, dtype=torch.bool)
    for j in range(columns):
        if pattern.m and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            keep[:, group] = keep_largest(weight[:, group] ** 2 / pivot[group], pattern.n)
        elif not pattern.m and j % width == 0:
            group = slice(j, min(j + width, columns))
            keep[:, group] = keep_matrix(weight[:, group] ** 2 / pivot[group], pattern.sparsity)
        removed = torch.where(keep[:, j], 0.0, weight[:, j])
        weight[:, j] -= removed
        weight[:, j + 1 :] -= torch.outer(removed, row[j][j + 1 :])
    return weight, keep


def admm(weight: Tensor, hessian: Tensor, pattern: Pattern, stages, *, damping=0.01, relaxation=1.5):
    """(weight, mask) of ADMM; stages: (rho, iterations) in order; the weights on the support are the exact minimum there.

    Splitting of "lower the error" (Y) and "hold the pattern" (Z) with scaled dual U, in coordinates where the Hessian has
    a unit diagonal. A dead input's weight is zero. Unstructured masks keep as many of the whole matrix as its rows together.
    """
    dead = hessian.diagonal() == 0
    weight = torch.where(dead, 0.0, weight)
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    hessian = hessian + 1e-6 * hessian.diagonal().mean() * identity
    scale = hessian.diagonal().sqrt()
    h = hessian / torch.outer(scale, scale)
    h, w = h + damping * identity, weight * scale

    def keep(values: Tensor) -> Tensor:
        if pattern.m:
            return keep_nm(values.abs(), pattern.n, pattern.m)
        removed = len(values) * int(values.shape[1] * pattern.sparsity)
        return keep_largest(values.abs().reshape(1, -1), values.numel() - removed).view_as(values)

    z, u, rho_before = torch.where(keep(w), w, 0.0), torch.zeros_like(w), None
    for rho, iterations in stages:
        u = u if rho_before is None else u * rho_before / rho
        for _ in range(iterations):
            y = torch.linalg.solve(h + rho * identity, (w @ h + rho * (z - u)).T).T
            t = relaxation * y + (1 - relaxation) * z + u
            mask = keep(t)
            z = torch.where(mask, t, 0.0)
            u = t - z
        rho_before = rho
    return least_squares_on_support(w, h, z != 0) / scale, z != 0


def least_squares_on_support(dense: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The weights that minimise (w' - w) H (w' - w)^T with w' zero outside the mask, row by row by its normal equations."""
    best = torch.zeros_like(dense)
    for i, row in enumerate(mask):
        kept = row.nonzero().flatten()
        best[i, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ dense[i])
    return best


def regional_error(block: nn.Module, calls: list[Call], targets: list[Tensor]) -> float:
    """sum_n || f(X_n) - f_pruned(X_n) ||^2."""
    with torch.no_grad():
        return sum(((block_output(block, c) - y) ** 2).sum().item() for c, y in zip(calls, targets, strict=True))


def refine(
    block: nn.Module, calls: list[Call], pattern: Pattern, gradients, *, alpha, rounds, learning_rate, relative=False
) -> None:
    """Regional optimisation of a dense block in place on all of `calls`, in their order in every round.

    The norms of a round's prune are those of the forwards just before it: of the dense block, then of the steps.
    RMSprop: v = 0.99 v + 0.01 g^2; w -= lr * g / (sqrt(v) + 1e-8), its state lives as long as the block's refinement.
    relative: each token's error is divided by the RMS of its target, and lr is multiplied by the dense matrix's RMS.
    """
    named = matrices(block)
    with torch.no_grad():
        targets = [block_output(block, call).clone() for call in calls]
    inputs = layer_inputs(block, calls)
    mean_square = {name: torch.zeros_like(matrix.weight) for name, matrix in named.items()}
    step_size = {
        name: learning_rate * ((matrix.weight**2).mean().sqrt() if relative else 1.0) for name, matrix in named.items()
    }

    def prune():
        scales = column_norms(inputs)
        for name, matrix in named.items():
            matrix.weight.mul_(pattern.keep(score(matrix.weight, scales[name], gradients[name], alpha)))

    def descend(call, target):
        block.zero_grad()
        error = block_output(block, call) - target
        ((error / token_rms(target) if relative else error) ** 2).sum().backward()
        for name, matrix in named.items():
            gradient = matrix.gradient
            mean_square[name] = 0.99 * mean_square[name] + 0.01 * gradient**2
            matrix.weight.sub_(step_size[name] * gradient / (mean_square[name].sqrt() + 1e-8))

    for _ in range(rounds):
        prune()
        inputs = []
        for call, target in zip(calls, targets, strict=True):
            with recorded_inputs(block) as recorded:
                descend(call, target)
            inputs.append(dict(recorded))
    prune()


class Agreement(NamedTuple):
    """`disputed` weights of `total` differ between two masks; within a group of choice they are at most `gap` apart."""

    disputed: int
    total: int
    gap: float

    @property
    def fraction(self) -> float:
        return 1 - self.disputed / self.total


def agreement(tested: Tensor, keep: Tensor, scores: Tensor, group: int) -> Agreement:
    """Compare a tested mask with the oracle's; `gap` is the largest relative distance of scores that changed places.

    `group` consecutive weights compete: m, in_features, or the whole matrix. Rounding may swap only near-equal scores.
    """
    disputed = (tested != keep).reshape(-1, group)
    scores = scores.reshape(-1, group)
    high = scores.masked_fill(~disputed, 0).amax(dim=-1)
    low = scores.masked_fill(~disputed, torch.inf).amin(dim=-1)
    gaps = ((high - low) / high)[disputed.any(dim=-1)]
    return Agreement(int(disputed.sum()), tested.numel(), gaps.max().item() if len(gaps) else 0.0)
