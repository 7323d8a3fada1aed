import pytest
import torch
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import small_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
# Llama-3.2-1B's MLP, and gate and up of a model of 10 M parameters
@pytest.mark.parametrize("shape", [(8192, 2048), (2048, 8192), (1536, 256)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 8, 16])
def bench_small_linear(row, backend, rows, shape, dtype):
    n, c = shape
    x = torch.randn(rows, c, dtype=dtype)
    out = torch.empty(rows, n, dtype=dtype)
    size = n * c * dtype.itemsize
    weights = rotated(lambda: torch.randn(n, c, dtype=dtype) / c**0.5, size)
    assert_close(small_linear(x, weights[0]), reference.small_linear(x, weights[0]), dtype)
    row([lambda w=w: small_linear(x, w, out=out) for w in weights], size)
