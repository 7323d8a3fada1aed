from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.cpu.quantized import quantization, stored
from layerskip_kernels.native.cpu.swiglu import swiglu as gated
from layerskip_kernels.native.tensor import address, dtype_code
from layerskip_kernels.ops.quantized import QuantizedWeight


def small_linear(
    x: Tensor,
    weights: Tensor | QuantizedWeight | Sequence[Tensor | QuantizedWeight],
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """See layerskip_kernels.ops.small_linear."""
    if swiglu:
        return gated(*small_linear(x, weights, bias=bias, norm=norm), out=out)
    m, c = x.shape
    if isinstance(weights, (Tensor, QuantizedWeight)):
        result = x.new_empty(m, weights.shape[0]) if out is None else out
        fields, formats = _fields(weights, bias, result), quantization(weights, "weights")
    else:
        if out is None:
            out = [x.new_empty(m, weight.shape[0]) for weight in weights]
        result, fields, formats = list(out), (), ()
        for i, weight in enumerate(weights):
            fields += _fields(weight, None if bias is None else bias[i], result[i])
            formats += quantization(weight, "weights")
    _cpu.small_linear(
        address(x, "x", "cpu"),
        x.stride(0),
        m,
        c,
        fields,
        0 if norm is None else address(norm[0], "norm weight", "cpu"),
        0.0 if norm is None else norm[1],
        0 if residual is None else address(residual, "residual", "cpu"),
        0 if residual is None else residual.stride(0),
        dtype_code(x, "x"),
        torch.get_num_threads(),
        formats,
    )
    return result


def _fields(weight: Tensor | QuantizedWeight, bias: Tensor | None, out: Tensor) -> tuple[int, ...]:
    elements = stored(weight)
    return (
        address(elements, "weights", "cpu"),
        elements.stride(0),
        elements.shape[0],
        0 if bias is None else address(bias, "bias", "cpu"),
        address(out, "out", "cpu"),
        out.stride(0),
    )
