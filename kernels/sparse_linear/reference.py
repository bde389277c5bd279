"""sparse_linear, literally: the dense product in fp32."""

from torch import Tensor

from wandapp.kernels.pack import Packed
from wandapp.kernels.pack.reference import unpack_reference


def sparse_linear_reference(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    y = x.float() @ unpack_reference(packed).float().T  # [tokens, out_features]
    return (y if bias is None else y + bias.float()).to(x.dtype)
