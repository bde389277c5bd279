"""Runs a packed model: transformers' own model, whose pruned linear maps read kept weights and bitmasks directly.

Decode is bound by the bytes of the weights, and the packed form has about half of them. Up to 16 tokens a packed kernel
runs; for more, panels of rows are unpacked into cache and multiplied densely (see `wandapp.kernels.sparse_linear`).
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from wandapp.blocks import find_blocks, find_linears
from wandapp.errors import WandappError
from wandapp.kernels import dispatch
from wandapp.kernels.pack import Packed, check_packed, pack, unpack
from wandapp.kernels.sparse_linear import sparse_linear
from wandapp.models import (
    LoadedModel,
    fill_skeleton,
    is_packed,
    load_model,
    load_tokenizer,
    module_names,
    resolve_device,
    resolve_dtype,
    skeleton,
)
from wandapp.packed import PackedCheckpoint
from wandapp.pattern import SparsityPattern


class SparseLinear(nn.Module):
    """y = x W^T + bias for a packed W [out_features, in_features]; takes the place of nn.Linear or GPT-2's Conv1D.

    Buffers `values`, `bitmask` and, when unstructured, `row_offsets` are named as in the packed checkpoint. For
    inference: the weight has no gradient.
    """

    def __init__(self, packed: Packed, bias: nn.Parameter | None = None):
        super().__init__()
        check_packed(packed)
        self.out_features, self.in_features = packed.shape
        self.pattern = packed.pattern
        self.register_buffer("values", packed.values)
        self.register_buffer("bitmask", packed.bitmask)
        self.register_buffer("row_offsets", packed.row_offsets)
        self.register_parameter("bias", bias)
        self._launch = None

    @property
    def packed(self) -> Packed:
        parts = self._buffers  # a module's own attribute lookup would cost as much as a small product
        shape = (self.out_features, self.in_features)
        return Packed(parts["values"], parts["bitmask"], parts["row_offsets"], shape, self.pattern)

    def forward(self, x: Tensor) -> Tensor:
        packed, bias = self.packed, self._parameters["bias"]
        if self._launch is None or torch.compiler.is_compiling() or not self._takes(x, packed.values):
            return self._checked_forward(x, packed, bias)
        # A registered operator costs 60 us per call, more than a small weight's product; its launcher costs 8.
        y = self._launch(x.reshape(-1, self.in_features).contiguous(), packed, bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _checked_forward(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        y = sparse_linear(x, packed, bias)
        if not torch.compiler.is_compiling():
            self._launch = dispatch.launcher("sparse_linear", x.device)
        return y

    def _takes(self, x: Tensor, values: Tensor) -> bool:
        return x.dtype is values.dtype and x.shape[-1] == self.in_features and x.device == values.device

    def _apply(self, fn, recurse=True):
        self._launch = None  # the device may change
        return super()._apply(fn, recurse)

    def to_dense(self) -> Tensor:
        """Weight [out_features, in_features]."""
        return unpack(self.packed)

    def kernel(self, tokens: int) -> str:
        """Name of what multiplies that many tokens here."""
        backend = dispatch.choose("sparse_linear", self.values.device.type)
        if backend != "cpu":
            return backend
        from wandapp import _C
        from wandapp.kernels.native import instruction_set
        from wandapp.kernels.sparse_linear.cpu import MAX_PACKED_TOKENS

        isa = instruction_set(None)
        isa = _C.best_isa() if isa == "auto" else isa
        return f"packed, {isa}" if tokens <= MAX_PACKED_TOKENS else "panels unpacked, dense product"

    def extra_repr(self) -> str:
        pattern = "unstructured" if self.pattern is None else "{}:{}".format(*self.pattern)
        return f"{self.in_features}, {self.out_features}, {pattern}, bias={self.bias is not None}"


def load_sparse(folder: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None) -> nn.Module:
    """The transformers model of a packed checkpoint, in eval mode, its linear maps `SparseLinear`.

    The dense model is never built: each tensor is read, checked and put in its place.

    dtype   of weights and activations; None: the checkpoint's own
    raises  WandappError on anything missing, damaged or not a packed checkpoint
    """
    target = resolve_device(device)
    checkpoint = PackedCheckpoint(folder)
    dtype = None if dtype is None else resolve_dtype(dtype)
    model = skeleton(folder, dtype=dtype, max_blocks=len(checkpoint.tensors))
    dense = {}
    for tensor, inside in module_names(model, checkpoint.tensors).items():
        if inside is None:
            raise WandappError(
                f"{folder}: {tensor} is one of several that {type(model).__name__} merges; unpack it first"
            )
        if not _place_sparse(model, checkpoint, tensor, inside):
            dense[inside] = tensor
    fill_skeleton(model, folder, ((inside, checkpoint.read_tensor(tensor)) for inside, tensor in dense.items()))
    return model.to(target)


def _place_sparse(model: nn.Module, checkpoint: PackedCheckpoint, tensor: str, inside: str) -> bool:
    """Puts a SparseLinear in the place of the module that owns `inside`; False where that needs a dense weight."""
    path, _, parameter_name = inside.rpartition(".")
    linears = checkpoint.tensors[tensor]
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    if not linears or not _can_be_sparse(module) or parameter_name != "weight":
        return False
    (linear,) = linears
    stored = linear.shape[::-1] if linear.transposed else linear.shape
    if tuple(module.weight.shape) != stored or linear.transposed != _is_conv1d(module):
        raise WandappError(
            f"{checkpoint.folder}: {linear.name} is {list(stored)}, config.json asks for {list(module.weight.shape)}"
        )
    values, bitmask, row_offsets, shape, pattern = checkpoint.read_linear(linear.name)
    offsets = None if row_offsets is None else row_offsets.clone()
    # copies, so that nothing depends on the file any more
    packed = Packed(values.to(module.weight.dtype, copy=True), bitmask.clone(), offsets, shape, pattern)
    _replace(model, path, SparseLinear(packed, module.bias))
    return True


def sparsify(model: nn.Module, pattern: str | SparsityPattern, *, skip: tuple[str, ...] = ()) -> nn.Module:
    """`model`, pruned and in memory, with every pruned nn.Linear and Conv1D of its blocks replaced by a SparseLinear.

    skip    as it was pruned: regular expressions of linear maps that stay as they are
    raises  WandappError naming the linear map that does not hold the pattern; those before it are replaced already
    """
    pattern = SparsityPattern.parse(pattern)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for name, view in find_linears(block, f"{prefix}.{index}", skip).items():
            module = model.get_submodule(name) if view.index is None else None
            if not _can_be_sparse(module) or any(re.search(expression, name) for expression in skip):
                continue
            try:
                packed = pack(view.weight, n=pattern.n, m=pattern.m)
            except WandappError as error:
                raise WandappError(f"{name}: {error}") from error
            _replace(model, name, SparseLinear(packed, module.bias))
    return model.eval()


def _can_be_sparse(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module | None) -> bool:
    return type(module).__name__ == "Conv1D"  # of transformers: y = x W + b


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def load_either(reference: str, *, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Model and tokenizer of a packed checkpoint, or of anything that `load_model` reads."""
    if not is_packed(reference):
        return load_model(reference, dtype=dtype, device=device)
    model = load_sparse(reference, device, None if dtype == "auto" else dtype)
    return LoadedModel(model, load_tokenizer(reference), reference)
