from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.tensor import address, dtype_code


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See layerskip_kernels.ops.swiglu."""
    m, n = gate.shape
    if out is None:
        out = gate.new_empty(m, n)
    _cpu.swiglu(
        address(gate, "gate", "cpu"),
        gate.stride(0),
        address(up, "up", "cpu"),
        up.stride(0),
        address(out, "out", "cpu"),
        out.stride(0),
        m,
        n,
        dtype_code(gate, "gate"),
        torch.get_num_threads(),
    )
    return out
