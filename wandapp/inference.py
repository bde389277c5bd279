"""Runs a packed model: transformers' own model, whose pruned linear maps read kept weights and bitmasks directly.

Decode is bound by the bytes of the weights, and the packed form has about half of them. Up to 16 tokens a packed kernel
runs; for more, panels of rows are unpacked into cache and multiplied densely (see `wandapp.kernels.sparse_linear`).
"""

import re
from collections.abc import Callable
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
        self._run, self._run_values, self._run_bias = None, None, None  # what `forward` calls, and what it was made for

    @property
    def packed(self) -> Packed:
        parts = self._buffers
        shape = (self.out_features, self.in_features)
        return Packed(parts["values"], parts["bitmask"], parts["row_offsets"], shape, self.pattern)

    def forward(self, x: Tensor) -> Tensor:
        values = self._buffers["values"]
        if (
            self._run_values is not values
            or self._run_bias is not self._parameters["bias"]
            or torch.compiler.is_compiling()
            or x.dtype is not values.dtype
            or x.shape[-1] != self.in_features
            or x.device != values.device
        ):
            return self._checked_forward(x)
        return self._run(x.contiguous())

    def _checked_forward(self, x: Tensor) -> Tensor:
        """Through the registered operator, which costs 60 us a call: more than the product of a small weight."""
        packed, bias = self.packed, self.bias
        y = sparse_linear(x, packed, bias)
        if not torch.compiler.is_compiling():
            self._run, self._run_values, self._run_bias = _prepared(packed, bias), packed.values, bias
        return y

    def _apply(self, fn, recurse=True):
        self._run = self._run_values = self._run_bias = None  # the memory may change
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


def _prepared(packed: Packed, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """sparse_linear on this weight, without the checks and look-ups of every call; the same launcher runs."""
    launch = dispatch.launcher("sparse_linear", packed.values.device)
    if dispatch.choose("sparse_linear", packed.values.device.type) == "cpu":
        from wandapp.kernels.sparse_linear.cpu import prepare_cpu

        return prepare_cpu(packed, bias)
    rows, cols = packed.shape
    return lambda x: launch(x.view(-1, cols), packed, bias).view(*x.shape[:-1], rows)


class TokenLinear(nn.Linear):
    """nn.Linear with a dense weight that multiplies single tokens by wandapp's kernel: for the output embedding."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == self.in_features and x.dtype is self.weight.dtype and not torch.compiler.is_compiling():
            from wandapp.kernels.sparse_linear.cpu import dense_linear_of_token_cpu

            return dense_linear_of_token_cpu(x.contiguous(), self.weight, self.bias)
        return super().forward(x)


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
    model.to(target)
    _speed_up_output(model)
    return model


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
    _speed_up_output(model)
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
