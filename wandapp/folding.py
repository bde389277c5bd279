"""Channels inside a decoder block that may change places: the block computes the same function, rounding apart.

A linear map's inputs may be renamed where other maps of the block make them one by one: rows there, columns here.

    intermediate channels    rows of gate and up, of fc1, or of both halves of a fused map; columns of down or fc2
    value channels           rows of v inside one head, columns of o in every query head that reads it (grouped queries)

No family's layout is written down. Value rows are found by what they say: the first token attends to nothing but itself,
so the input of o is there a copy of v's output, head by head. For intermediate channels a few layouts are tried. Then
either is put to the test: channels are renamed, one sample runs, and the input of the consuming map must be what it was,
renamed. What fails is undone, bit for bit, and said.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandapp.blocks import DecoderBlock, LinearView

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # some ten roundings of a channel's norm
LEAST_SCALE = 0.25  # of what is added to a norm's weight: some count from one, and are near zero themselves


@dataclass(frozen=True)
class Fold:
    """Channels of one map's input and where else they live; they may change places inside their set.

    consumer  the linear map that reads them
    columns   [sets, channels, copies] input features of the consumer that hold a channel (copies: query heads of a set)
    rows      by producing map: [sets, channels, copies] its output features that make a channel
    """

    consumer: str
    columns: Tensor
    rows: dict[str, Tensor]

    @property
    def channels(self) -> int:
        """Channels of one set."""
        return self.columns.shape[1]

    def reversed_order(self) -> Tensor:
        """[sets, channels], an order in which nearly everything moves: for a test."""
        return torch.arange(self.channels).flip(0).expand(self.columns.shape[:2])

    def apply_(self, block: DecoderBlock, order: Tensor) -> None:
        """Renames channels in the block's weights and biases: channel c of set s is now the one that was order[s, c]."""
        _reorder_(block.all_linears[self.consumer].weight, 1, self.column_index(block, order))
        for name, index in self.row_indices(block, order).items():
            view = block.all_linears[name]
            _reorder_(view.weight, 0, index)
            bias = bias_of(block.module, view)
            if bias is not None:
                _reorder_(bias, 0, index)

    def column_index(self, block: DecoderBlock, order: Tensor) -> Tensor:
        """[in_features], by place of the consumer's input the feature that comes there."""
        return _index(self.columns, order, block.all_linears[self.consumer].weight.shape[1])

    def row_indices(self, block: DecoderBlock, order: Tensor) -> dict[str, Tensor]:
        """The same by place of each producer's output, [out_features]."""
        return {name: _index(rows, order, block.all_linears[name].weight.shape[0]) for name, rows in self.rows.items()}


def _index(places: Tensor, order: Tensor, features: int) -> Tensor:
    index = torch.arange(features)
    index[places] = places.gather(1, order[:, :, None].expand_as(places))
    return index


def _reorder_(tensor: Tensor, axis: int, index: Tensor) -> None:
    tensor.copy_(tensor.index_select(axis, index.to(tensor.device)))


def bias_of(module: nn.Module, view: LinearView) -> Tensor | None:
    """[out_features] the vector that is added to the map's product, or None."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter is view.parameter:
                bias = getattr(owner, "bias" if name == "weight" else f"{name}_bias", None)
                if bias is None:
                    return None
                return bias.data if view.index is None else bias.data[view.index]
    return None


class Trace:
    """What every linear map saw and said in one forward of one sample, in the order of the calls.

    inputs, outputs  by map: [tokens, in_features], [tokens, out_features]
    result           [tokens, hidden_size] the block's output
    """

    def __init__(self, block: DecoderBlock, sample: Tensor):
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._given: dict[str, Tensor] = {}

        def note(view: LinearView, x: Tensor, y: Tensor | None) -> None:
            self._given.setdefault(view.name, x)
            self.inputs[view.name] = x.flatten(0, -2)
            if y is not None:
                self.outputs[view.name] = y.flatten(0, -2)

        with torch.no_grad():
            self.result = block.watch(sample, note).flatten(0, -2)
        self.order = list(self.inputs)

    def group(self, name: str) -> list[str]:
        """The map and those called just before it that read the very same tensor."""
        last = self.order.index(name)
        first = last
        while first and self._given[self.order[first - 1]] is self._given[name]:
            first -= 1
        return self.order[first : last + 1]

    def reads_alone(self, name: str) -> bool:
        """Whether no other map reads this map's input."""
        return sum(x is self._given[name] for x in self._given.values()) == 1


@contextmanager
def uneven_norms(block: DecoderBlock) -> Iterator[None]:
    """While it lasts, the block's vectors but for its maps' biases differ from channel to channel.

    One that stands between two maps and does not move along, such as a norm's weight, is the more noticed for it: as trained
    it may be flat to within the rounding of 16 bits.
    """
    moving = [bias_of(block.module, view) for view in block.all_linears.values()]
    places = {bias.data_ptr() for bias in moving if bias is not None}
    vectors = [p.data for p in block.module.parameters() if p.dim() == 1 and p.data_ptr() not in places]
    values = [vector.clone() for vector in vectors]
    generator = torch.Generator().manual_seed(0)
    try:
        for vector in vectors:
            scale = max(vector.float().square().mean().sqrt().item(), LEAST_SCALE)
            vector += (scale * (0.5 + torch.rand(len(vector), generator=generator))).to(vector)
        yield
    finally:
        for vector, value in zip(vectors, values, strict=True):
            vector.copy_(value)


def candidates(block: DecoderBlock, trace: Trace, width: int) -> list[str]:
    """Maps to prune that write hidden states, `width` wide, from an input of their own: o, down and their like."""
    return [
        name
        for name, view in block.linears.items()
        if name in trace.inputs and view.weight.shape[0] == width and trace.reads_alone(name)
    ]


def proposals(block: DecoderBlock, trace: Trace, consumer: str) -> Iterator[Fold]:
    """Folds of a consumer that its shape and the trace allow, likeliest first; none is certain before it is tested."""
    value_fold = _value_fold(block, trace, consumer)
    if value_fold:
        yield value_fold
        return
    place = trace.order.index(consumer)
    if place:
        yield from _intermediate_folds(block, consumer, trace.group(trace.order[place - 1]))


def _intermediate_folds(block: DecoderBlock, consumer: str, producers: list[str]) -> Iterator[Fold]:
    width = block.all_linears[consumer].weight.shape[1]
    columns = torch.arange(width).view(1, width, 1)
    made = {name: block.all_linears[name].weight.shape[0] for name in producers}
    if all(features == width for features in made.values()):
        yield Fold(consumer, columns, dict.fromkeys(producers, columns))
    if len(made) == 1 and made[producers[0]] == 2 * width:  # gate and up in one map: one after the other, or in turn
        yield Fold(consumer, columns, {producers[0]: torch.cat([columns, columns + width], dim=2)})
        yield Fold(consumer, columns, {producers[0]: torch.cat([2 * columns, 2 * columns + 1], dim=2)})


def expert_fold(sibling: Fold, consumer: str) -> Fold:
    """The fold of another expert, whose consumer is stored with the sibling's and carries its own index."""
    index = consumer.rpartition(".")[2]

    def of_expert(name: str) -> str:
        return f"{name.rpartition('.')[0]}.{index}"

    return Fold(of_expert(sibling.consumer), sibling.columns, {of_expert(n): rows for n, rows in sibling.rows.items()})


def _value_fold(block: DecoderBlock, trace: Trace, consumer: str) -> Fold | None:
    """The rows of an earlier map that the first token's input of the consumer copies, head by head."""
    width = block.all_linears[consumer].weight.shape[1]
    if not block.heads or width % block.heads:
        return None
    size = width // block.heads
    heads = trace.inputs[consumer][0].view(block.heads, size)
    for producer in reversed(trace.order[: trace.order.index(consumer)]):
        starts = _starts(trace.outputs[producer][0], heads)
        if starts:
            return _fold_of_heads(consumer, producer, starts, size)
    return None


def _fold_of_heads(consumer: str, producer: str, starts: list[int], size: int) -> Fold | None:
    """starts: for each query head the first row of its values; heads with one start are a set."""
    sets = [[head for head, own in enumerate(starts) if own == start] for start in dict.fromkeys(starts)]
    if len({len(heads) for heads in sets}) > 1:
        return None
    channels = torch.arange(size).view(1, size, 1)
    columns = torch.tensor(sets)[:, None, :] * size + channels
    rows = torch.tensor(list(dict.fromkeys(starts))).view(-1, 1, 1) + channels
    return Fold(consumer, columns, {producer: rows})


def _starts(output: Tensor, heads: Tensor) -> list[int]:
    """Where each of `heads` [heads, size] stands in `output` [features]; empty where one stands nowhere."""
    size = heads.shape[1]
    if len(output) < size:
        return []
    windows = output.float().unfold(0, size, 1)  # [places, size]
    found = []
    for head in heads.float():
        limit = TOLERANCE[output.dtype] * head.abs().max()
        near = ((output[: len(windows)].float() - head[0]).abs() <= limit).nonzero().flatten()
        fits = (windows[near] - head).abs().amax(dim=1) <= limit if len(near) else near.bool()
        if head.any() and fits.any():
            found.append(int(near[fits][0]))
        else:
            return []
    return found


def holds(block: DecoderBlock, folds: list[Fold], orders: list[Tensor], before: Trace, after: Trace) -> bool:
    """Whether every map saw after renaming what it had seen, renamed for the folds' consumers, and the block said the same.

    Which tokens reach an expert, rounding may decide: experts count only as consumers, and those that the sample does not
    reach go by those stored with them.
    """
    renamed = {fold.consumer: fold.column_index(block, order) for fold, order in zip(folds, orders, strict=True)}
    for name, seen in before.inputs.items():
        if name in renamed:
            seen = seen.index_select(1, renamed[name].to(seen.device))
        elif block.all_linears[name].is_expert:
            continue
        if not _equal(after.inputs.get(name), seen):
            return False
    said = (_equal(after.outputs[name], before.outputs[name]) for name in renamed if name in before.outputs)
    return all(said) and (block.has_experts or _equal(after.result, before.result))


def _equal(found: Tensor | None, expected: Tensor) -> bool:
    """Up to rounding, feature by feature; a feature much smaller than most counts as large as the median."""
    if found is None or found.shape != expected.shape:
        return False
    norms = expected.float().norm(dim=0)
    error = (found.float() - expected.float()).norm(dim=0)
    return bool((error <= TOLERANCE[expected.dtype] * norms.clamp_min(norms.median().item())).all())
