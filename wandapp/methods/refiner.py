"""What refiners share: they wrap a method (or another refiner), improve the block it pruned, and keep the better weights.

`method+first+second` is second(first(method)): each refines what the one inside it left. A refiner supplies `refine`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandapp.blocks import DecoderBlock
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.methods.base import ERROR_SAMPLES, BlockRecord, BlockStore, Method, block_error
from wandapp.pattern import SparsityPattern
from wandapp.statistics import Measurements


class Snapshot:
    """Values of parameters, to be put back."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.values = {parameter: parameter.data.clone() for parameter in parameters}

    def restore(self) -> None:
        for parameter, value in self.values.items():
            parameter.data.copy_(value)


class Masters:
    """fp32 values of parameters while they are optimised; the parameter itself where storage is fp32.

    values   by parameter, of its shape
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.values = {p: p.data if p.dtype == torch.float32 else p.data.float() for p in parameters}

    def take_gradients(self, ranks: Ranks, keep: Mapping[nn.Parameter, Tensor], scale: float = 1.0) -> list[Tensor]:
        """Moves the parameters' gradients, summed over ranks, to the values, and lets the parameters require none.

        keep    factors of the gradient by parameter: 1.0 where a weight is trained and 0.0 elsewhere
        scale   of the loss, taken out of the gradients
        """
        for parameter, master in self.values.items():
            if parameter.grad is None:
                gradient = torch.zeros_like(master)
            elif parameter in keep:
                gradient = parameter.grad * keep[parameter]  # fp32, in one pass over both
            else:
                gradient = parameter.grad.float()
            gradient = ranks.sum_(gradient.contiguous())
            master.grad = gradient if scale == 1.0 else gradient.div_(scale)
            parameter.grad = None
            parameter.requires_grad_(False)
        return [master.grad for master in self.values.values() if master.grad is not None]

    def store(self) -> None:
        """Rounds the values into the parameters."""
        for parameter, master in self.values.items():
            if master.data_ptr() != parameter.data_ptr():
                parameter.data.copy_(master)


class LossScale:
    """A factor of the loss that keeps gradients which are stored in fp16 finite; other types need none.

    left_out   steps whose gradients no factor made finite
    """

    LOWER, TRIES = 2.0**-4, 10

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.is_needed = any(parameter.dtype == torch.float16 for parameter in parameters)
        self.value, self.left_out = 1.0, 0

    def run(self, gradients: Callable[[float], list[Tensor]]) -> list[Tensor]:
        """What gradients(factor of the loss) returns, all ranks' sum without that factor; zeros where it stays infinite."""
        for _ in range(self.TRIES):
            found = gradients(self.value)
            if not self.is_needed or all(gradient.isfinite().all() for gradient in found):
                return found
            self.value *= self.LOWER
        self.left_out += 1
        self.value = 1.0
        return [gradient.zero_() for gradient in found]

    def tell(self, what: str, warnings: list[str]) -> None:
        """Adds to the warnings how many steps were left out."""
        if self.left_out:
            warnings.append(f"{what}: {self.left_out} steps were left out, as their gradients overflow float16")


@dataclass
class Refinement:
    """What a refiner may use beside the measurements: the pattern, and the weights before any pruning.

    warnings   the block's, to which it adds
    """

    pattern: SparsityPattern
    dense: Snapshot | None
    warnings: list[str]


class Refiner(Method):
    """Wraps `method`; the better of the block's weights before and after it is kept, by the error on the leading samples."""

    compensates = True
    title = "refinement"  # in warnings

    def __init__(self, config: PruneConfig, method: Method):
        super().__init__(config, method.ranks)
        self.method, self.needs = method, method.needs

    @property
    def scorer(self) -> Method:
        return self.method.scorer

    @property
    def outputs_read(self) -> int | None:
        """All: they are what it optimises for."""
        return None

    @property
    def follows_dense_path(self) -> bool:
        return self.method.follows_dense_path

    @property
    def loss(self) -> str:
        """Kind of `output_error` by which the better weights are told."""
        return "frobenius"

    @property
    def is_idle(self) -> bool:
        """Whether its options leave it nothing to do."""
        return False

    def refine(self, block: DecoderBlock, hidden: Tensor, measured: Measurements, refinement: Refinement) -> None:
        """Improves the pruned block in place."""
        raise NotImplementedError(f"{type(self).__name__} refines nothing")

    def parameters(self, block: DecoderBlock) -> list[nn.Parameter]:
        """What it changes."""
        return linear_parameters(block)

    def prepare(self, store: BlockStore, tokens: Tensor, hidden: Tensor) -> float:
        return self.method.prepare(store, tokens, hidden)

    def transform(
        self, block: DecoderBlock, hidden: Tensor, measured: Measurements, pattern: SparsityPattern, record: BlockRecord
    ) -> None:
        dense = None if self.method.compensates or self.is_idle else Snapshot(linear_parameters(block))
        self.method.transform(block, hidden, measured, pattern, record)
        if self.is_idle or not self.parameters(block):
            return
        targets = self.targets(measured)
        probe = targets[: measured.share.leading(ERROR_SAMPLES)]
        if targets is not self.method.targets(measured):
            record.error_before = block_error(block, hidden, probe, self.ranks)
        elif record.error_before is None:
            record.error_before = record.error
        before, earlier = Snapshot(self.parameters(block)), block_error(block, hidden, probe, self.ranks, self.loss)
        self.refine(block, hidden, measured, Refinement(pattern, dense, record.warnings))
        error = block_error(block, hidden, probe, self.ranks, self.loss)
        if not error <= earlier:  # NaN too
            before.restore()
            record.warnings.append(
                f"{block.name}: {self.title} changed the block's error from {earlier:.4g} to {error:.4g}; the weights "
                "before it were kept"
            )
        record.error = block_error(block, hidden, probe, self.ranks)


def linear_parameters(block: DecoderBlock) -> list[nn.Parameter]:
    """The stored tensors of the linear maps to prune; experts share one."""
    return list(dict.fromkeys(view.parameter for view in block.linears.values()))


def zero_skipped_(block: DecoderBlock, stored: Mapping[nn.Parameter, Tensor]) -> None:
    """Zeroes, in tensors shaped as parameters, the place of experts that stay dense beside others that do not."""
    for name, view in block.all_linears.items():
        if name not in block.linears and view.parameter in stored:
            view.of(stored[view.parameter]).zero_()


def block_generator(seed: int, index: int) -> torch.Generator:
    """What is random about one block, alike on all ranks; any seed of 64 bits."""
    return torch.Generator().manual_seed((seed * 100_003 + index) % 2**63)
