from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address, optional
from layerskip_kernels.native.cuda.rms_norm import rms_norm
from layerskip_kernels.native.tensor import dtype_code


def small_linear(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """See layerskip_kernels.ops.small_linear."""
    m, c = x.shape
    single = isinstance(weights, Tensor)
    ws = [weights] if single else list(weights)
    biases = [bias] if single else [None] * len(ws) if bias is None else bias
    if swiglu:
        outs = [x.new_empty(m, ws[0].shape[0]) if out is None else out] * 2
    elif out is None:
        outs = [x.new_empty(m, w.shape[0]) for w in ws]
    else:
        outs = [out] if single else list(out)
    if norm is not None and m > _cuda.FUSED_NORM_ROWS:
        x, norm = rms_norm(x, *norm), None
    launch.run(
        "small_linear",
        _cuda.small_linear,
        (x, *ws),
        address(x, "x"),
        x.stride(0),
        m,
        c,
        [_fields(*each) for each in zip(ws, biases, outs)],
        0 if norm is None else address(norm[0], "norm weight"),
        0.0 if norm is None else norm[1],
        optional(residual, "residual"),
        0 if residual is None else residual.stride(0),
        swiglu,
        dtype_code(x, "x"),
    )
    return outs[0] if single or swiglu else outs


def _fields(weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[int, ...]:
    return (
        address(weight, "weights"),
        weight.stride(0),
        weight.shape[0],
        optional(bias, "bias"),
        address(out, "out"),
        out.stride(0),
    )
