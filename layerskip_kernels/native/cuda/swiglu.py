from __future__ import annotations

from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address
from layerskip_kernels.native.tensor import dtype_code


def swiglu(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See layerskip_kernels.ops.swiglu."""
    m, n = gate.shape
    if out is None:
        out = gate.new_empty(m, n)
    launch.run(
        "swiglu",
        _cuda.swiglu,
        (gate, up),
        address(gate, "gate"),
        gate.stride(0),
        address(up, "up"),
        up.stride(0),
        address(out, "out"),
        out.stride(0),
        m,
        n,
        dtype_code(gate, "gate"),
    )
    return out
