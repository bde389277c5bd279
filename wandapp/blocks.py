"""Decoder blocks found, driven and watched without any model's code being copied.

A block's call arguments are recorded from the model's own forward, never rebuilt. Every linear map of a block, however
it is stored, is presented as one `LinearView` of shape [out_features, in_features]. `DecoderBlock.watch` shows a
forward's matrix products to an observer: that is how all statistics are gathered.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from wandapp.errors import WandappError, shorten


class UnsupportedLayoutError(WandappError):
    """A model whose blocks or weights cannot be presented as decoder blocks of linear maps."""


@dataclass(frozen=True, eq=False)
class LinearView:
    """One linear map, seen as [out_features, in_features] whatever its storage.

    name        dotted name in the model; an expert of a 3-D parameter carries its index: "...experts.down_proj.5"
    parameter   the stored tensor: nn.Linear [out, in], Conv1D [in, out], experts [experts, out, in]
    index       the expert's index in a 3-D parameter, else None
    transposed  True where storage is [in, out]
    """

    name: str
    parameter: nn.Parameter
    index: int | None = None
    transposed: bool = False

    def of(self, stored: Tensor) -> Tensor:
        """View [out, in] of this map in a tensor shaped like the parameter (the weight, its gradient, a master copy)."""
        stored = stored if self.index is None else stored[self.index]
        return stored.T if self.transposed else stored

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], shares memory with the parameter."""
        return self.of(self.parameter.data)

    @property
    def is_expert(self) -> bool:
        return self.index is not None


@dataclass
class RecordedCall:
    """Arguments of a block beside the hidden states, as the model's own forward passed them."""

    args: tuple
    kwargs: dict[str, Any]
    hidden_keyword: str | None = None

    def to(self, device: torch.device, moved: dict[int, Tensor]) -> "RecordedCall":
        """The same on `device`; `moved` (by identity) keeps tensors that blocks share shared."""

        def move(value: Any) -> Any:
            return moved.setdefault(id(value), value.to(device)) if isinstance(value, Tensor) else value

        return RecordedCall(tree_map(move, self.args), tree_map(move, self.kwargs), self.hidden_keyword)


class _StopForward(Exception):
    """Ends a forward whose remaining result nobody reads; its argument, if any, is what was wanted of it."""


Observer = Callable[[LinearView, Tensor, Tensor | None], Any]

_PRODUCTS = {  # function -> position of (input, weight) among its arguments
    torch.nn.functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.__matmul__: (0, 1),
}


class _Watch(TorchFunctionMode):
    """Shows every product x W^T of a known weight to an observer(view, x, y); y is None where the forward ends there.

    A tensor that the observer returns takes the place of y.
    """

    def __init__(self, views: dict[int, LinearView], observer: Observer, last: str | None, leaves: bool):
        super().__init__()
        self.views, self.observer, self.last, self.leaves = views, observer, last, leaves
        self.leaf_names: set[str] = set()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        positions = _PRODUCTS.get(func)
        view = None
        if positions and len(args) > positions[1] and args[positions[1]].dim() == 2:
            view = self.views.get(args[positions[1]].data_ptr())
        if positions is None or view is None:
            return func(*args, **(kwargs or {}))
        x = args[positions[0]]
        if view.name == self.last:
            self.observer(view, x, None)
            raise _StopForward
        y = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and not x.requires_grad:
            self.leaf_names.add(view.name)
            if self.leaves:
                y.requires_grad_()  # gradients are wanted from here on, not further back
        replaced = self.observer(view, x, y)
        return y if replaced is None else replaced


@dataclass
class DecoderBlock:
    """One decoder block: its linear maps, its recorded arguments, and forwards over many samples.

    name      dotted name in the model, e.g. "model.layers.3"
    linears       linear maps to prune by name, in definition order
    all_linears   these and the skipped ones
    calls         recorded arguments by batch size
    flops         floating-point operations spent in this block so far (multiply and add count as two)
    heads         query heads of its attention; 0 where the config does not say
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, LinearView]
    calls: dict[int, RecordedCall]
    all_linears: dict[str, LinearView]
    attention_flops_per_token: float = 0.0
    flops: float = 0.0
    heads: int = 0
    _macs_per_token: dict[str, float] = field(default_factory=dict)  # of each linear map, once a forward was watched
    _uncounted: int = 0  # tokens that ran before that, whose experts are not in flops yet
    _leaf_names: set[str] = field(default_factory=set)
    _last: str | None = None
    _order: list[str] = field(default_factory=list)  # linear maps as a forward meets them

    @property
    def has_experts(self) -> bool:
        return any(view.is_expert for view in self.all_linears.values())

    def __call__(self, hidden: Tensor, until: str | None = None) -> Tensor:
        """Output hidden states [batch, seq_len, hidden] of the block for input hidden states of the same shape.

        until   end with this linear map, and return its product instead, [batch, seq_len, out_features]
        """
        tokens = hidden.shape[0] * hidden.shape[1]
        self.flops += tokens * self._flops_per_token(until)
        self._uncounted += 0 if self._macs_per_token else tokens
        if until is None:
            return self._forward(hidden)

        def end(view: LinearView, x: Tensor, y: Tensor | None) -> None:
            raise _StopForward(y)

        view = self.all_linears[until]
        try:
            with _Watch({view.weight.data_ptr(): view}, end, last=None, leaves=False):
                self._forward(hidden)
        except _StopForward as stopped:
            return stopped.args[0].reshape(*hidden.shape[:2], -1)
        raise AssertionError(f"{until}: no product in this forward")

    def _forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[0] not in self.calls:
            raise WandappError(
                f"{self.name}: no call was recorded for a batch of {hidden.shape[0]}; recorded: {sorted(self.calls)}"
            )
        call = self.calls[hidden.shape[0]]
        hidden = hidden.to(next(self.module.parameters()).device)  # they may live in a file
        if call.hidden_keyword:
            output = self.module(*call.args, **{call.hidden_keyword: hidden}, **call.kwargs)
        else:
            output = self.module(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output

    @property
    def forward_flops_per_token(self) -> float:
        """2 * (weights that a token meets) + attention; experts count by the tokens routed to them."""
        return self._flops_per_token()

    def _flops_per_token(self, until: str | None = None, since: str | None = None) -> float:
        """Of a forward's part that ends with the linear map `until`, or begins after `since`, where attention is over."""
        names = self._order if until or since else list(self.all_linears)
        names = names[names.index(since) + 1 if since else 0 : names.index(until) + 1 if until else None]
        views = (self.all_linears[name] for name in names)
        linear = sum(
            self._macs_per_token.get(view.name, 0.0 if view.is_expert else float(view.weight.numel())) for view in views
        )
        return 2.0 * linear + (0.0 if since else self.attention_flops_per_token)

    @property
    def attention_end(self) -> str | None:
        """The linear map that ends the first of the modules which a forward runs through: attention, in most blocks.

        None where all maps belong to one module, where experts come first or nothing of the first is to be pruned, and
        before any forward was watched.
        """
        is_pruned = False
        for name, following in itertools.pairwise(self._order):
            is_pruned |= name in self.linears
            if sub_module(name, self.name) != sub_module(following, self.name):
                return name if is_pruned and not self.all_linears[name].is_expert else None
        return None

    def batches(self, samples: int, batch_size: int | None = None) -> Iterator[slice]:
        """Slices that cut `samples` rows into recorded batch sizes."""
        batch_size = batch_size or max(self.calls)
        return (slice(start, min(start + batch_size, samples)) for start in range(0, samples, batch_size))

    @torch.no_grad()
    def run_(self, hidden: Tensor) -> Tensor:
        """Replaces hidden [samples, seq_len, hidden], batch by batch, with the block's outputs; returns it."""
        for rows in self.batches(len(hidden)):
            hidden[rows] = self(hidden[rows])
        return hidden

    def watch(self, hidden: Tensor, observer: Observer, *, stop: bool = False, leaves: bool = False) -> Tensor | None:
        """Runs one batch and calls observer(view, x, y) at every linear map; returns the output.

        What the observer returns, if anything, goes on in the place of y.

        stop     end at the last linear map's input, whose product nobody reads; the result is then None
        leaves   make each first product require a gradient, so that a backward reaches all of them and no further
        """
        seen: dict[str, int] = {}
        order: list[str] = []

        def count(view: LinearView, x: Tensor, y: Tensor | None) -> Any:
            seen[view.name] = seen.get(view.name, 0) + x.numel() // x.shape[-1]
            order.append(view.name)
            return observer(view, x, y)

        last = self._last if stop else None
        views = {view.weight.data_ptr(): view for view in self.all_linears.values()}
        output = None
        try:
            with _Watch(views, count, last, leaves) as watch:
                output = self._forward(hidden)
            self._leaf_names |= watch.leaf_names
        except _StopForward:
            pass
        tokens = hidden.shape[0] * hidden.shape[1]
        self._learn(seen, order, tokens)
        skipped = 2.0 * self._macs_per_token[last] if last else 0.0
        self.flops += tokens * (self.forward_flops_per_token - skipped)
        return output

    def backward(
        self,
        loss: Tensor,
        *,
        tokens: int,
        with_vectors: bool = False,
        until: str | None = None,
        since: str | None = None,
    ) -> None:
        """Backward of a loss of one forward over `tokens` tokens: gradients of activations and of weights.

        Counted as twice the forward, less the gradients of inputs in front of the first linear maps, which no one needs.

        with_vectors   the norms in front of the first linear maps want gradients, too, so nothing is spared
        until, since   linear maps where the forward ended, and up to which nothing requires a gradient
        """
        loss.backward()
        spared = 0.0 if with_vectors else 2.0 * sum(self._macs_per_token.get(name, 0.0) for name in self._leaf_names)
        self.flops += tokens * (2.0 * self._flops_per_token(until, since) - spared)

    def _learn(self, seen: dict[str, int], order: list[str], tokens: int) -> None:
        """Remembers how many tokens meet each weight, and which linear map comes last in every forward."""
        for name, rows in seen.items():
            self._macs_per_token[name] = self.all_linears[name].weight.numel() * rows / tokens
        experts = sum(macs for name, macs in self._macs_per_token.items() if self.all_linears[name].is_expert)
        self.flops += 2.0 * self._uncounted * experts
        self._uncounted = 0
        met = {id(self.all_linears[name].parameter) for name in seen}  # some expert of every parameter meets a token
        unseen = [name for name, view in self.linears.items() if id(view.parameter) not in met]
        if unseen:
            raise UnsupportedLayoutError(
                f"{unseen[0]}: the weight takes part in no matrix product that {type(self.module).__name__}'s forward "
                "shows; exclude it with --skip or report the model's class"
            )
        self._order = list(dict.fromkeys(self._order + order))
        if self._last is None and not self.all_linears[order[-1]].is_expert and order.count(order[-1]) == 1:
            self._last = order[-1]


def sub_module(name: str, block: str) -> str:
    """The block's own module that holds a linear map, by both their dotted names; "" where the map is such a module itself."""
    return name.removeprefix(f"{block}.").rpartition(".")[0].partition(".")[0]


def position_table(model: nn.Module) -> int | None:
    """How many positions the model looks up in a table (GPT-2, OPT); None where it computes them, and may go further."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not positions:
        return None
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    # OPT's has two spare rows
    return positions if any(positions <= table.num_embeddings <= positions + 2 for table in tables) else None


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Dotted name and ModuleList of the decoder blocks: the longest outermost list of modules that hold weights."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedLayoutError(
            f"{type(model).__name__}: encoder-decoder models are not supported; use a decoder-only causal language model"
        )
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(p.dim() >= 2 for p in module.parameters())
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(other + ".") for other in lists)}
    if not outer:
        raise UnsupportedLayoutError(
            f"{type(model).__name__}: no ModuleList of decoder blocks was found; use a decoder-only causal language model"
        )
    name = max(outer, key=lambda key: len(outer[key]))
    if any(getattr(module, "is_decoder", None) is False for module in outer[name].modules()):
        raise UnsupportedLayoutError(
            f"{type(model).__name__}: an encoder, whose attention looks ahead; use a decoder-only causal language model, or set "
            "is_decoder in config.json if this one is"
        )
    return name, outer[name]


def find_linears(block: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> dict[str, LinearView]:
    """Every linear map of a block by dotted name.

    A weight that fits no known layout is refused by its module's class, unless a `skip` expression excludes it.
    """
    found: dict[str, LinearView] = {}
    for name, what, views in _weights(block, prefix):
        found.update((view.name, view) for view in views)
        if not views and not any(re.search(expression, name) for expression in skip):
            end = re.escape(".".join(name.split(".")[-2:]))
            raise UnsupportedLayoutError(
                f"{name}: {what} is no linear map that wandapp knows (nn.Linear, Conv1D, routers, 3-D experts); leave it dense "
                f"with --skip '{end}$' if the rest is to be pruned"
            )
    return found


def unknown_weights(block: nn.Module, prefix: str) -> list[str]:
    """Dotted names of a block's weights that fit no known layout, so that a `skip` expression must exclude them."""
    return [name for name, _, views in _weights(block, prefix) if not views]


def _weights(block: nn.Module, prefix: str) -> Iterator[tuple[str, str, list[LinearView]]]:
    """(name, what it is, its linear maps) of each weight; the name is its module's, or its own where it is called otherwise."""
    for module_name, module in block.named_modules():
        path = ".".join(filter(None, (prefix, module_name)))
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and "bias" not in parameter_name:
                what = f"{type(module).__name__}.{parameter_name} of shape {tuple(parameter.shape)}"
                name = path if parameter_name == "weight" else f"{path}.{parameter_name}"
                yield name, what, list(_views(module, path, parameter_name, parameter))


def _views(module: nn.Module, path: str, parameter_name: str, parameter: nn.Parameter) -> Iterator[LinearView]:
    """The linear maps of a weight; none where it fits no known layout."""
    kind = type(module).__name__
    is_only_weight = parameter_name == "weight" and parameter.dim() == 2
    if is_only_weight and (isinstance(module, nn.Linear) or kind.endswith("Router")):
        yield LinearView(path, parameter)
    elif is_only_weight and kind == "Conv1D":  # transformers.pytorch_utils.Conv1D (GPT-2): y = x W + b
        yield LinearView(path, parameter, transposed=True)
    elif parameter.dim() == 3 and kind.endswith("Experts"):
        transposed = bool(getattr(module, "is_transposed", False))
        for index in range(len(parameter)):
            yield LinearView(f"{path}.{parameter_name}.{index}", parameter, index, transposed)


@dataclass
class Recording:
    """First block's inputs and every block's arguments.

    hidden   [samples, seq_len, hidden_size] embedded calibration tokens
    calls    calls[block][batch_size]
    """

    hidden: Tensor
    calls: list[dict[int, RecordedCall]]


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, replace: Callable[[int, Tensor, RecordedCall], Tensor]) -> Iterator[None]:
    """Makes each block return replace(index, hidden states, other arguments), in the form its own forward returns."""
    wrappers: list[Callable] = []  # some models index a block's output, so its form must be kept

    def install(index: int, block: nn.Module) -> None:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            keyword = None if args else "hidden_states"
            hidden = args[0] if keyword is None else kwargs[keyword]
            rest = {key: value for key, value in kwargs.items() if key != keyword}
            output = replace(index, hidden, RecordedCall(args[1:], rest, keyword))
            if not wrappers:
                with torch.no_grad():
                    form = type(original(*args, **kwargs))
                wrappers.append((lambda state: form((state,))) if form in (tuple, list) else (lambda state: state))
            return wrappers[0](output)

        block.forward = forward

    for index, block in enumerate(blocks):
        install(index, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def forward_from(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits [samples, seq_len, vocabulary] of the model if its last block returned `hidden` for these tokens."""
    with _replaced_forwards(blocks, lambda index, *_: hidden):
        return model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def record(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    batch_size: int,
    *,
    allocate: Callable[..., Tensor] = torch.empty,
) -> Recording:
    """Runs the model's own forward on tokens [samples, seq_len] with recorders for blocks.

    All blocks are called once for the first two batches of each size, which shows arguments that depend on the text;
    after that a forward ends at the first block. Sizes recorded: batch_size, 1 and the remainder.

    allocate   makes the tensor for the first block's inputs, from shape and dtype
    """
    base = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    calls: list[dict[int, RecordedCall]] = [{} for _ in blocks]
    times_recorded: dict[int, int] = {}
    hidden_states: Tensor | None = None
    start: int | None = 0  # of the batch in work among the samples; None once all have been through

    def on_call(index: int, hidden: Tensor, call: RecordedCall) -> Tensor:
        nonlocal hidden_states
        size = len(hidden)
        if index == 0 and start is not None:
            if hidden_states is None:
                hidden_states = allocate((len(tokens), *hidden.shape[1:]), dtype=hidden.dtype)
            hidden_states[start : start + size] = hidden
        if times_recorded.get(size, 0) >= 2:
            raise _StopForward
        earlier = calls[index].setdefault(size, call)
        _refuse_text_dependence(earlier, call, type(blocks[index]).__name__)
        return hidden

    def forward(batch: Tensor) -> None:
        try:
            with forward_errors(model):
                base(input_ids=batch.to(device), use_cache=False)
        except _StopForward:
            pass
        times_recorded[len(batch)] = times_recorded.get(len(batch), 0) + 1

    with _replaced_forwards(blocks, on_call):
        for start in range(0, len(tokens), batch_size):
            forward(tokens[start : start + batch_size])
        start = None
        for sample in range(min(2, len(tokens))):
            if times_recorded.get(1, 0) < 2:
                forward(tokens[sample : sample + 1])
    missing = [index for index, by_size in enumerate(calls) if not by_size]
    if missing or hidden_states is None:
        raise UnsupportedLayoutError(
            f"{type(model).__name__}: block {missing[0] if missing else 0} ({type(blocks[0]).__name__}) is not called by "
            "the model's forward; this model's layout is not supported"
        )
    return Recording(hidden_states, calls)


@contextmanager
def forward_errors(model: nn.Module) -> Iterator[None]:
    """Turns what a model of odd sizes raises in its own forward, such as of a rotary embedding, into one sentence."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        if isinstance(error, WandappError):
            raise
        reason = shorten(" ".join(str(error).split()))
        raise WandappError(
            f"{type(model).__name__}: the model cannot run ({reason}); check its config.json, or free memory"
        ) from error


def _refuse_text_dependence(earlier: RecordedCall, later: RecordedCall, kind: str) -> None:
    if earlier is later:
        return
    for a, b in zip(tree_flatten(earlier.__dict__)[0], tree_flatten(later.__dict__)[0], strict=True):
        if isinstance(a, Tensor) and a.isnan().any():
            raise WandappError(
                f"{kind}: a call argument of shape {tuple(a.shape)} is NaN; check what config.json says of positions"
            )
        if isinstance(a, Tensor) and a is not b and not torch.equal(a, b):
            raise UnsupportedLayoutError(
                f"{kind}: a call argument of shape {tuple(a.shape)} changes with the text, so it cannot be recorded once; "
                "this model's layout is not supported"
            )
