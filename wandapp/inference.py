"""Runs a packed model: transformers' own model, whose pruned linear maps are packed (see `wandapp.modules`)."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from wandapp.blocks import LinearView, find_blocks, find_linears
from wandapp.conversion import Home, tensor_homes
from wandapp.devices import resolve_device, resolve_dtype
from wandapp.errors import WandappError
from wandapp.kernels import dispatch
from wandapp.kernels.pack import Packed, join_rows, pack
from wandapp.memory import give_back
from wandapp.models import LoadedModel, load_model
from wandapp.modules import SparseExperts, SparseLinear, TokenLinear
from wandapp.packed import PackedCheckpoint, PackedLinear
from wandapp.pattern import SparsityPattern
from wandapp.routing import DENSE, TOKENS, RoutingTable, table_for
from wandapp.saving import remember
from wandapp.skeleton import call_experts_singly, fill_skeleton, skeleton
from wandapp.tokenizer import load_tokenizer
from wandapp.weight_files import is_packed

Pieces = list[tuple[Home, str]]  # the checkpoint's tensors that make up one parameter, by expert and then by row


def load_sparse(
    folder: str | Path,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    require_sparse: bool = False,
    routes: RoutingTable | None = None,
) -> nn.Module:
    """The transformers model of a packed checkpoint, in eval mode, its linear maps `SparseLinear`.

    The dense model is never built: each tensor is read, checked and put in its place.

    dtype                    of weights and activations; None: the checkpoint's own
    require_sparse, routes   see `route`
    raises                   WandappError on anything missing, damaged or not a packed checkpoint
    """
    target = resolve_device(device)
    checkpoint = PackedCheckpoint(folder)
    dtype = None if dtype is None else resolve_dtype(dtype)
    model = skeleton(folder, dtype=dtype, max_blocks=len(checkpoint.tensors))
    parameters = _pieces_by_parameter(model, checkpoint)
    dense = {name: pieces for name, pieces in parameters.items() if not _place_sparse(model, checkpoint, name, pieces)}
    fill_skeleton(model, folder, ((name, _dense(checkpoint, pieces)) for name, pieces in dense.items()))
    stored_dense = {piece for pieces in parameters.values() for piece in pieces if not checkpoint.tensors[piece[1]]}
    names = {
        home.name.removesuffix(".weight") + ("" if home.expert is None else f".{home.expert}")
        for home, _ in stored_dense
    }
    model = _made_ready(model.to(target), checkpoint.pattern, names)
    return route(model, routes, require_sparse=require_sparse)


def _pieces_by_parameter(model: nn.Module, checkpoint: PackedCheckpoint) -> dict[str, Pieces]:
    found: dict[str, Pieces] = {}
    for tensor, home in tensor_homes(model, checkpoint.tensors).items():
        found.setdefault(home.name, []).append((home, tensor))
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: (piece[0].expert or 0, piece[0].part))
        parts = pieces[0][0].parts
        grid = [Home(name, expert, part, parts) for expert in range(len(pieces) // parts) for part in range(parts)]
        alike = len({checkpoint.shape_of(tensor) for _, tensor in pieces}) == 1
        if [home for home, _ in pieces] not in ([Home(name)], grid) or not alike:
            raise WandappError(f"{checkpoint.folder}: {pieces[0][1]} and its like do not make up {name}; pack it again")
    return found


def _place_sparse(model: nn.Module, checkpoint: PackedCheckpoint, name: str, pieces: Pieces) -> bool:
    """Puts packed weights in the place of parameter `name`; False where the model needs that parameter dense."""
    path, _, parameter_name = name.rpartition(".")
    linears = _linears_by_expert(checkpoint, pieces)
    try:
        module = model.get_submodule(path)
        parameter = module.get_parameter(parameter_name)
    except AttributeError:
        return False
    if not linears or not (_is_linear(module) and parameter_name == "weight" or _is_experts(module, parameter)):
        return False
    transposed = _is_transposed(module)
    rows, cols = sum(linear.shape[0] for linear in linears[0]), linears[0][0].shape[1]
    stored = (cols, rows) if transposed else (rows, cols)
    shape = (len(linears), *stored) if parameter.dim() == 3 else stored
    if tuple(parameter.shape) != shape or any(linear.transposed != transposed for one in linears for linear in one):
        raise WandappError(
            f"{checkpoint.folder}: {linears[0][0].name} is {list(shape)}, config.json asks for {list(parameter.shape)}"
        )
    packed = [join_rows([_copied(checkpoint.read_linear(one.name), parameter.dtype) for one in its]) for its in linears]
    _replace(model, name, packed)
    return True


def _linears_by_expert(checkpoint: PackedCheckpoint, pieces: Pieces) -> list[list[PackedLinear]]:
    """The packed linear maps of a parameter, each expert's from above to below; empty where a piece is stored dense."""
    by_expert: dict[int, list[PackedLinear]] = {}
    for home, tensor in pieces:
        linears = checkpoint.tensors[tensor]
        if not linears:
            return []
        for linear in linears:
            by_expert.setdefault(home.expert or linear.index or 0, []).append(linear)
    return [by_expert[expert] for expert in sorted(by_expert)]


def _copied(packed: Packed, dtype: torch.dtype) -> Packed:
    """A copy, so that nothing depends on the file any more; values in `dtype`, but int8 stays int8."""
    values, bitmask, offsets, scale = (None if part is None else part.clone() for part in packed.parts)
    values = values if scale is not None else values.to(dtype)
    return packed._replace(values=values, bitmask=bitmask, row_offsets=offsets, scale=scale)


def _dense(checkpoint: PackedCheckpoint, pieces: Pieces) -> Tensor:
    tensors = [checkpoint.read_tensor(tensor) for _, tensor in pieces]
    home = pieces[0][0]
    if home.expert is None:
        return tensors[0]
    return torch.stack([torch.cat(tensors[i : i + home.parts]) for i in range(0, len(tensors), home.parts)])


def sparsify(model: nn.Module, pattern: str | SparsityPattern, *, skip: tuple[str, ...] = ()) -> nn.Module:
    """`model`, pruned and in memory, with every pruned linear map of its blocks replaced by a packed one.

    skip    as it was pruned: regular expressions of linear maps that stay as they are
    raises  WandappError naming the linear map that does not hold the pattern; those before it are replaced already
    """
    pattern = SparsityPattern.parse(pattern)
    kept_dense = set()
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        views: dict[int, list[LinearView]] = {}
        for view in find_linears(block, f"{prefix}.{index}", skip).values():
            views.setdefault(id(view.parameter), []).append(view)
        names = {id(parameter): name for name, parameter in block.named_parameters()}
        for key, its_views in views.items():
            name = f"{prefix}.{index}.{names[key]}"
            module = model.get_submodule(name.rpartition(".")[0])
            skipped = {view.name for view in its_views for expression in skip if re.search(expression, view.name)}
            kept_dense |= skipped
            if not skipped and (_is_linear(module) or _is_experts(module, its_views[0].parameter)):
                _replace(model, name, [_pack_view(view, pattern) for view in its_views])
    return _made_ready(model.eval(), pattern, kept_dense)


def _pack_view(view: LinearView, pattern: SparsityPattern) -> Packed:
    try:
        return pack(view.weight, n=pattern.n, m=pattern.m)
    except WandappError as error:
        raise WandappError(f"{view.name}: {error}") from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # of transformers: y = x W + b


def _is_experts(module: nn.Module, parameter: Tensor) -> bool:
    return type(module).__name__.endswith("Experts") and parameter.dim() == 3


def _is_transposed(module: nn.Module) -> bool:
    return _is_conv1d(module) or bool(getattr(module, "is_transposed", False))


def _replace(model: nn.Module, name: str, packed: list[Packed]) -> None:
    """Replaces parameter `name`: a linear map's whole module by a SparseLinear, one of experts by SparseExperts."""
    path, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(path)
    transposed = _is_transposed(module)
    if _is_linear(module):
        parent, _, child = path.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            SparseLinear(packed[0], module.bias, transposed=transposed, trusted=True),
        )
    else:
        delattr(module, parameter_name)
        setattr(module, parameter_name, SparseExperts.of(packed, transposed=transposed))


def _made_ready(model: nn.Module, pattern: SparsityPattern, kept_dense: set[str]) -> nn.Module:
    """`model`, after what any packed model needs."""
    if any(isinstance(module, SparseExperts) for module in model.modules()):
        call_experts_singly(model)
    _speed_up_output(model)
    remember(model, pattern, kept_dense)
    return model


def _speed_up_output(model: nn.Module) -> None:
    """The output embedding is never pruned, and in 16 bit torch's product with it would take most of a token's time."""
    output = model.get_output_embeddings()
    if (
        type(output) is nn.Linear
        and output.weight.dtype in (torch.bfloat16, torch.float16)
        and output.weight.is_cpu
        and output.in_features % 64 == 0
        and dispatch.choose("sparse_linear", "cpu") == "cpu"
    ):
        output.__class__ = TokenLinear  # keeps a tied weight tied


def route(model: nn.Module, table: RoutingTable | None = None, *, require_sparse: bool = False) -> nn.Module:
    """`model`, each of its packed linear maps with the kernels that `table` has for its shape.

    table           None: on a GPU the machine's own, measured now for the shapes it lacks; on the CPU none is needed
    require_sparse  refuse a model of which some product would run dense
    raises          WandappError naming the first such linear map
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    device = next(model.parameters()).device
    if table is None and device.type == "cuda" and dispatch.forced_backend() is None:
        table = table_for((module.packed for module in linears.values() if module.scale is None), device)
    for module in linears.values():
        module.routes = table if module.scale is None else None  # int8 values have one kernel per device
    if require_sparse:
        _require_sparse(model, linears)
    return model


def _require_sparse(model: nn.Module, linears: dict[str, SparseLinear]) -> None:
    if not linears:
        raise WandappError(
            f"{type(model).__name__}: none of its linear maps is packed, and sparse kernels were required"
        )
    for name, module in linears.items():
        dense = [tokens for tokens in TOKENS if (choice := module.route(tokens)) and choice.kernel == DENSE]
        if dense:
            raise WandappError(
                f"{name}: for {dense[0]} tokens the dense product was the fastest here, and sparse kernels were required; "
                "do without --require-sparse"
            )


def dense_fallbacks(model: nn.Module) -> dict[int, tuple[int, int]]:
    """For each measured number of tokens at which it happens: (packed linear maps that run dense, all of them)."""
    linears = [module for module in model.modules() if isinstance(module, SparseLinear)]
    found: dict[int, tuple[int, int]] = {}
    for tokens in TOKENS:
        dense = sum((choice := module.route(tokens)) is not None and choice.kernel == DENSE for module in linears)
        if dense:
            found[tokens] = dense, len(linears)
    return found


def fallback_notes(model: nn.Module) -> list[str]:
    """One line per number of tokens at which packed linear maps run dense, since that was faster here."""
    return [
        f"{tokens} tokens: {dense} of {every} packed linear maps run dense, which was measured to be faster here"
        for tokens, (dense, every) in dense_fallbacks(model).items()
    ]


def load_either(
    reference: str, *, dtype: str = "auto", device: str = "cpu", require_sparse: bool = False
) -> LoadedModel:
    """Model and tokenizer of a packed checkpoint, or of anything that `load_model` reads."""
    if not is_packed(reference):
        if require_sparse:
            raise WandappError(
                f"{reference}: no packed checkpoint, and sparse kernels were required; wandapp pack it first"
            )
        loaded = load_model(reference, dtype=dtype, device=device)
    else:
        model = load_sparse(reference, device, None if dtype == "auto" else dtype, require_sparse=require_sparse)
        loaded = LoadedModel(model, load_tokenizer(reference), reference)
    give_back()  # reading a tokenizer alone leaves 43 MiB with the process
    return loaded
