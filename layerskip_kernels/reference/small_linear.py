import torch

from layerskip_kernels.ops.quantized import QuantizedWeight
from layerskip_kernels.reference.quantized import product
from layerskip_kernels.reference.rms_norm import rms_norm
from layerskip_kernels.reference.swiglu import swiglu as gated


def small_linear(x, weights, *, bias=None, norm=None, residual=None, swiglu=False, out=None):
    if swiglu:
        return gated(*small_linear(x, weights, bias=bias, norm=norm), out=out)
    if norm is not None:
        x = rms_norm(x, *norm)
    if not isinstance(weights, (torch.Tensor, QuantizedWeight)):
        bias = bias or [None] * len(weights)
        out = out or [None] * len(weights)
        return [small_linear(x, w, bias=b, out=o) for w, b, o in zip(weights, bias, out)]
    y = product(x, weights)
    if bias is not None:
        y = y + bias.float()
    y = y.to(x.dtype)
    if residual is not None:
        y = (residual.float() + y.float()).to(x.dtype)
    return y if out is None else out.copy_(y)
