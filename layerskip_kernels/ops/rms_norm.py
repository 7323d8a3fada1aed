from __future__ import annotations

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.registry import resolve


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Root-mean-square norm of each row: ``x / sqrt(mean(x²) + eps) · weight`` (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        x: [M, C] float32, float16 or bfloat16.
        weight: [C], dtype of x.
        eps: added to the mean of squares, > 0.
        residual: [M, C]; updated in place to ``residual + x`` (rounded), and that sum is normed instead of x.
        out: [M, C] to write the result to.

    Returns:
        [M, C] in the dtype of x; float32 arithmetic, rounded once after the product with the weight.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range.
    """
    _check.tensor("x", x, (None, None), dtype=_check.FLOATS)
    _check.tensor("weight", weight, (x.shape[1],), dtype=x.dtype, like=x)
    _check.positive("eps", eps)
    _check.optional("residual", residual, tuple(x.shape), dtype=x.dtype, like=x)
    _check.optional("out", out, tuple(x.shape), dtype=x.dtype, like=x)
    if torch.compiler.is_compiling():
        return _library.into(out, torch.ops.layerskip_kernels.rms_norm(x, weight, eps, residual))
    return resolve("rms_norm", x.device, x.dtype)(x, weight, eps, residual=residual, out=out)


_library.register(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual=None) -> Tensor",
    lambda x, weight, eps, residual=None: rms_norm(x, weight, eps, residual=residual),
    lambda x, weight, eps, residual=None: x.new_empty(x.shape),
)
