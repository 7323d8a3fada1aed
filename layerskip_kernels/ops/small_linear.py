from __future__ import annotations

from collections.abc import Sequence

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.ops.quantized import QuantizedWeight, check_one_kind, check_weight, refuse_tracing
from layerskip_kernels.registry import resolve


def small_linear(
    x: torch.Tensor,
    weights: torch.Tensor | QuantizedWeight | Sequence[torch.Tensor | QuantizedWeight],
    *,
    bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    out: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """``x @ Wᵀ + bias`` for few rows: the weights, stored row-major as checkpoints store them, are read once.

    Args:
        x: [M, C] float32, float16 or bfloat16.
        weights: [N, C], or a list of [N_i, C] that share x (q/k/v, gate/up) and are done in one pass. Tensors of the
            dtype of x, or `QuantizedWeight` all of as many bits.
        bias: [N], or with a list of weights a list of [N_i] or None.
        norm: (weight [C], eps): `rms_norm` of x first, rounded as the op of that name rounds.
        residual: [M, N], single weight only: the result is ``residual + linear``. `out` may be the same tensor.
        swiglu: weights is [gate, up], of equal N: the result is the op `swiglu` of their products.
        out: where to write the result; a list with a list of weights, but for swiglu.

    Returns:
        [M, N], or a list of [M, N_i]. float32 sums; rounded after the bias, and again after the residual or swiglu.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range.
    """
    many = not isinstance(weights, (torch.Tensor, QuantizedWeight))
    ws, bs = _lists(weights, bias)
    _check.tensor("x", x, (None, None), dtype=_check.FLOATS)
    rows, width = x.shape
    for i, w in enumerate(ws):
        check_weight(f"weights[{i}]" if many else "weights", w, (None, width), dtype=x.dtype, like=x)
        _check.optional(f"bias[{i}]" if many else "bias", bs[i], (w.shape[0],), dtype=x.dtype, like=x)
    quantized = isinstance(ws[0], QuantizedWeight)
    if many:
        check_one_kind("weights", ws)
    if norm is not None:
        if not isinstance(norm, (tuple, list)) or len(norm) != 2:
            raise TypeError(f"norm: expected (weight, eps), got {type(norm).__name__}")
        _check.tensor("norm[0]", norm[0], (width,), dtype=x.dtype, like=x)
        _check.positive("norm[1]", norm[1])
    if residual is not None and many:
        raise ValueError("residual: needs a single weight, got a list")
    _check.optional("residual", residual, (rows, ws[0].shape[0]), dtype=x.dtype, like=x)
    if swiglu and [w.shape[0] for w in ws] != 2 * [ws[0].shape[0]]:
        found = ", ".join(str(list(w.shape)) for w in ws)
        raise ValueError(f"swiglu: needs weights [gate, up] of one shape, got {found}")
    if swiglu:
        _check.optional("out", out, (rows, ws[0].shape[0]), dtype=x.dtype, like=x)
    elif out is not None:
        outs = _sequence("out", out) if many else [out]
        if len(outs) != len(ws):
            raise ValueError(f"out: {len(outs)} tensors, expected {len(ws)} like weights")
        for i, (o, w) in enumerate(zip(outs, ws)):
            _check.tensor(f"out[{i}]" if many else "out", o, (rows, w.shape[0]), dtype=x.dtype, like=x)
    if quantized:
        refuse_tracing("weights")
    if torch.compiler.is_compiling():
        norm_weight, eps = norm or (None, 0.0)
        result = torch.ops.layerskip_kernels.small_linear(x, ws, bs, norm_weight, eps, residual, swiglu)
        return _library.into(out, result if many and not swiglu else result[0])
    op = resolve("small_linear", x.device, x.dtype, quantized=quantized)
    return op(x, weights, bias=bias, norm=norm, residual=residual, swiglu=swiglu, out=out)


def _lists(weights, bias) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    if isinstance(weights, (torch.Tensor, QuantizedWeight)):
        return [weights], [bias]
    if not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected a tensor or a list of tensors, got {type(weights).__name__}")
    ws = list(weights)
    if not ws:
        raise ValueError("weights: an empty list, expected at least one tensor")
    bs = [None] * len(ws) if bias is None else _sequence("bias", bias)
    if len(bs) != len(ws):
        raise ValueError(f"bias: {len(bs)} entries, expected {len(ws)} like weights")
    return ws, bs


def _sequence(name, value) -> list:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list like weights, got {type(value).__name__}")
    return list(value)


def _kernel(x, weights, bias, norm_weight=None, norm_eps=0.0, residual=None, swiglu=False):
    norm = None if norm_weight is None else (norm_weight, norm_eps)
    if swiglu:
        return [small_linear(x, weights, bias=bias, norm=norm, swiglu=True)]
    if residual is not None:
        return [small_linear(x, weights[0], bias=bias[0], norm=norm, residual=residual)]
    return small_linear(x, weights, bias=bias, norm=norm)


def _fake(x, weights, bias, norm_weight=None, norm_eps=0.0, residual=None, swiglu=False):
    return [x.new_empty(x.shape[0], w.shape[0]) for w in (weights[:1] if swiglu else weights)]


_library.register(
    "small_linear(Tensor x, Tensor[] weights, Tensor?[] bias, Tensor? norm_weight=None, float norm_eps=0.0, "
    "Tensor? residual=None, bool swiglu=False) -> Tensor[]",
    _kernel,
    _fake,
)
