from __future__ import annotations

from torch import Tensor

from layerskip_kernels.native.tensor import address, dtype_code
from layerskip_kernels.ops.quantized import QuantizedWeight


def quantization(weight: Tensor | QuantizedWeight, name: str) -> tuple[int, ...]:
    """The fields of csrc/cpu/quantization.h; none for a tensor."""
    if isinstance(weight, Tensor):
        return ()
    scale, group, offset = weight.scale, weight.group, weight.offset
    return (
        weight.bits,
        group,
        address(scale, f"{name}.scale", "cpu"),
        scale.stride(0),
        dtype_code(scale, f"{name}.scale"),
        0 if offset is None else address(offset, f"{name}.offset", "cpu"),
        0 if offset is None else offset.stride(0),
    )


def stored(weight: Tensor | QuantizedWeight) -> Tensor:
    """The tensor that holds the weight's elements."""
    return weight if isinstance(weight, Tensor) else weight.values
