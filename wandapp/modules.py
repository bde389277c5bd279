"""The modules of a packed model: linear maps and experts that read kept weights and bitmasks directly.

Decode is bound by the bytes of the weights, and the packed form has about half of them. Kernels for few and for many tokens
read that form (see `wandapp.kernels.sparse_linear`); a dense copy of a weight never exists.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from wandapp.errors import WandappError
from wandapp.kernels import dispatch
from wandapp.kernels.pack import Packed, check_bits, check_packed, unpack
from wandapp.kernels.sparse_linear import check_call, sparse_linear
from wandapp.routing import Choice, Kernels, RoutingTable


class SparseLinear(nn.Module):
    """y = x W^T + bias for a packed W [out_features, in_features]; takes the place of nn.Linear or GPT-2's Conv1D.

    Buffers `values`, `bitmask`, when unstructured `row_offsets` and with int8 values `scale` are named as in the packed
    checkpoint. For inference: the weight has no gradient.

    transposed  the dense model stores this weight as [in, out]
    trusted     the bits of `packed` are known to fit its values
    """

    def __init__(
        self, packed: Packed, bias: nn.Parameter | None = None, *, transposed: bool = False, trusted: bool = False
    ):
        super().__init__()
        check_packed(packed)
        if not trusted:
            check_bits(packed)
        self.out_features, self.in_features = packed.shape
        self.pattern, self.transposed = packed.pattern, transposed
        self.register_buffer("values", packed.values)
        self.register_buffer("bitmask", packed.bitmask)
        self.register_buffer("row_offsets", packed.row_offsets)
        self.register_buffer("scale", packed.scale)
        self.register_parameter("bias", bias)
        self.routes: RoutingTable | None = None  # the device's measured kernels; None: what dispatch chooses
        self._forget()

    @property
    def packed(self) -> Packed:
        parts = self._buffers
        shape = (self.out_features, self.in_features)
        return Packed(parts["values"], parts["bitmask"], parts["row_offsets"], shape, self.pattern, parts["scale"])

    def forward(self, x: Tensor) -> Tensor:
        values = self._buffers["values"]
        if (
            self._run_values is not values
            or self._run_bias is not self._parameters["bias"]
            or torch.compiler.is_compiling()
            or x.dtype is not self._run_dtype
            or x.shape[-1] != self.in_features
            or x.device != values.device
        ):
            return self._checked_forward(x)
        return self._run(x.contiguous())

    def _checked_forward(self, x: Tensor) -> Tensor:
        """Through the registered operator, which costs 60 us a call: more than the product of a small weight."""
        packed, bias = self.packed, self.bias
        if torch.compiler.is_compiling():
            return sparse_linear(x, packed, bias)
        check_call(x, packed, bias)
        if self._is_routed:
            self._run = kernels = Kernels(self.routes, packed, bias)
            self.values, self.bitmask = kernels.packed[:2]  # may lie in cuSPARSELt's form now
        else:
            self._run = _prepared(packed, bias, x.dtype)
        self._run_values, self._run_bias, self._run_dtype = self._buffers["values"], bias, x.dtype
        return self._run(x.contiguous())

    def _forget(self) -> None:
        """No prepared call: `_run` is what `forward` calls, the others say what it was made for."""
        self._run = self._run_values = self._run_bias = self._run_dtype = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()  # the memory may change
        scale, device = self._buffers["scale"], self.values.device
        super()._apply(fn, recurse)
        if scale is not None and self.scale.dtype != scale.dtype:  # model.bfloat16() must not round it
            self.scale = scale.to(self.scale.device)
        if self.values.device != device:
            self.routes = None  # they were measured there
        return self

    @property
    def _is_routed(self) -> bool:
        return self.routes is not None and dispatch.forced_backend() is None

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """linear(x, module, bias) and x @ module, as if the module were its weight: so experts run (`SparseExperts`)."""
        x, module, *bias = args
        if (
            function is nn.functional.linear
            and not module.transposed
            or function is Tensor.matmul
            and module.transposed
        ):
            y = module(x)
            bias = bias or [(kwargs or {}).get("bias")]
            return y if bias[0] is None else y + bias[0]
        raise WandappError(
            f"a packed weight multiplies from the right, by linear or @; {function.__name__} needs it dense"
        )

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Weight [out_features, in_features]; of int8 values in `dtype`, None = float32."""
        return unpack(self.packed, dtype=None if self.scale is None else dtype, trusted=True)

    def kernel(self, tokens: int) -> str:
        """Name of what multiplies that many tokens here."""
        choice = self.route(tokens)
        if choice:
            return choice.kernel
        backend = dispatch.choose("sparse_linear", self.values.device.type)
        if backend != "cpu":
            return backend
        from wandapp import _C
        from wandapp.kernels.native import instruction_set

        isa = instruction_set(None)
        isa = _C.best_isa() if isa == "auto" else isa
        return f"packed, {isa}" if self.scale is None else f"packed int8, {isa}"

    def route(self, tokens: int) -> Choice | None:
        """What the table of measured kernels says; None where there is no table or a backend is forced."""
        return self.routes.choice(self.packed, tokens) if self._is_routed else None

    def extra_repr(self) -> str:
        pattern = "unstructured" if self.pattern is None else "{}:{}".format(*self.pattern)
        values = str(self.values.dtype).removeprefix("torch.")
        return f"{self.in_features}, {self.out_features}, {pattern}, {values}, bias={self.bias is not None}"


def _prepared(packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """sparse_linear of x in `dtype`, without the checks and look-ups of every call; the same launcher runs."""
    launch = dispatch.launcher("sparse_linear", packed.values.device)
    if dispatch.choose("sparse_linear", packed.values.device.type) == "cpu":
        from wandapp.kernels.sparse_linear.cpu import prepare_cpu

        return prepare_cpu(packed, bias, dtype)
    rows, cols = packed.shape
    return lambda x: launch(x.view(-1, cols), packed, bias).view(*x.shape[:-1], rows)


class SparseExperts(nn.ModuleList):
    """Packed weights in the place of a 3-D parameter: item e is the `SparseLinear` of expert e.

    The experts' own forward, which takes `parameter[e]` as a weight of nn.functional.linear or @, then runs as it is.
    """

    @classmethod
    def of(cls, weights: list[Packed], *, transposed: bool) -> "SparseExperts":
        return cls(SparseLinear(packed, transposed=transposed, trusted=True) for packed in weights)


class TokenLinear(nn.Linear):
    """nn.Linear with a dense weight that multiplies single tokens by wandapp's kernel: for the output embedding."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == self.in_features and x.dtype is self.weight.dtype and not torch.compiler.is_compiling():
            from wandapp.kernels.sparse_linear.cpu import dense_linear_of_token_cpu

            return dense_linear_of_token_cpu(x.contiguous(), self.weight, self.bias)
        return super().forward(x)
