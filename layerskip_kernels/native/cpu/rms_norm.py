from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.tensor import address, dtype_code


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See layerskip_kernels.ops.rms_norm."""
    m, c = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _cpu.rms_norm(
        address(x, "x", "cpu"),
        x.stride(0),
        address(weight, "weight", "cpu"),
        0 if residual is None else address(residual, "residual", "cpu"),
        0 if residual is None else residual.stride(0),
        address(out, "out", "cpu"),
        out.stride(0),
        m,
        c,
        eps,
        dtype_code(x, "x"),
        torch.get_num_threads(),
    )
    return out
