from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.tensor import address, dtype_code
from layerskip_kernels.ops.quantized import BLOCK, QuantizedWeight, not_finite, unset


def quantize(
    weight: Tensor, bits: int, group: int = BLOCK, *, error: Tensor | None = None, norm: Tensor | None = None
) -> QuantizedWeight:
    """See layerskip_kernels.ops.quantize."""
    result = unset(weight, bits, group)
    n, c = weight.shape
    bad_row = _cpu.quantize(
        address(weight, "weight", "cpu"),
        weight.stride(0),
        bits,
        group,
        address(result.values, "values", "cpu"),
        address(result.scale, "scale", "cpu"),
        0 if error is None else address(error, "error", "cpu"),
        0 if norm is None else address(norm, "norm", "cpu"),
        n,
        c,
        dtype_code(weight, "weight"),
        torch.get_num_threads(),
    )
    if bad_row < n:
        raise not_finite(bad_row)
    return result
