from __future__ import annotations

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.registry import resolve


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``silu(gate) · up`` with ``silu(z) = z / (1 + exp(-z))`` (Shazeer, arXiv 2002.05202).

    Args:
        gate, up: [M, I] float32, float16 or bfloat16.
        out: [M, I] to write the result to; may be gate or up.

    Returns:
        [M, I] in the dtype of gate; float32 arithmetic, rounded once.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape or device.
    """
    _check.tensor("gate", gate, (None, None), dtype=_check.FLOATS)
    _check.tensor("up", up, tuple(gate.shape), dtype=gate.dtype, like=gate)
    _check.optional("out", out, tuple(gate.shape), dtype=gate.dtype, like=gate)
    if torch.compiler.is_compiling():
        return _library.into(out, torch.ops.layerskip_kernels.swiglu(gate, up))
    return resolve("swiglu", gate.device, gate.dtype)(gate, up, out=out)


_library.register("swiglu(Tensor gate, Tensor up) -> Tensor", swiglu, lambda gate, up: gate.new_empty(gate.shape))
