import torch

from layerskip_kernels.ops.quantized import BLOCK, QuantizedWeight, dequantize

_ROWS_AT_ONCE = 8192  # of the weight


def product(x, weight):
    """x [M, C] @ Wᵀ, float32 [M, N], with a weight of either kind [N, C]."""
    if not isinstance(weight, QuantizedWeight):
        return x.float() @ weight.float().T
    x = rounded(x)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for first in range(0, weight.shape[0], _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        values, scale, group, offset = weight
        part = QuantizedWeight(values[some], scale[some], group, None if offset is None else offset[some])
        y[:, some] = x @ dequantize(part, torch.float64).T
    return y.float()


def rounded(x):
    """x [M, C] as products with quantized weights see it, float64: see `QuantizedWeight`."""
    rows, width = x.shape
    x = torch.nn.functional.pad(x.double(), (0, -width % BLOCK)).view(rows, -(-width // BLOCK), BLOCK)
    largest = x.abs().amax(2, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1  # floor(log2(largest))
    scale = torch.where(largest < 2.0**-100, 1, torch.ldexp(torch.ones_like(largest), exponent - 14))
    q = (x / scale).round().clamp(-32767, 32767)
    q = torch.where(largest < 2.0**-100, 0, q) * scale
    q = torch.where(largest.isfinite(), q, float("nan"))
    return q.flatten(1)[:, :width]
