from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address, optional
from layerskip_kernels.native.tensor import dtype_code


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See layerskip_kernels.ops.rms_norm."""
    m, c = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch.run(
        "rms_norm",
        _cuda.rms_norm,
        (x, weight, residual),
        address(x, "x"),
        x.stride(0),
        address(weight, "weight"),
        optional(residual, "residual"),
        0 if residual is None else residual.stride(0),
        address(out, "out"),
        out.stride(0),
        m,
        c,
        eps,
        dtype_code(x, "x"),
    )
    return out
