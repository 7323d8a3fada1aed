from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.tensor import address, dtype_code


def small_linear(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """See layerskip_kernels.ops.small_linear."""
    m, c = x.shape
    single = isinstance(weights, Tensor)
    if single:
        weights, bias, out = (weights,), (bias,), (out,)
    results, fields = [], []
    for i, weight in enumerate(weights):
        y = None if out is None else out[i]
        if y is None:
            y = x.new_empty(m, weight.shape[0])
        b = None if bias is None else bias[i]
        results.append(y)
        fields += (
            address(weight, "weights", "cpu"),
            weight.stride(0),
            weight.shape[0],
            0 if b is None else address(b, "bias", "cpu"),
            address(y, "out", "cpu"),
            y.stride(0),
        )
    _cpu.small_linear(
        address(x, "x", "cpu"),
        x.stride(0),
        m,
        c,
        tuple(fields),
        0 if norm is None else address(norm[0], "norm weight", "cpu"),
        0.0 if norm is None else norm[1],
        0 if residual is None else address(residual, "residual", "cpu"),
        0 if residual is None else residual.stride(0),
        dtype_code(x, "x"),
        torch.get_num_threads(),
    )
    return results[0] if single else results
