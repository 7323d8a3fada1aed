import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import quantize, small_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("shape", [(8192, 2048), (2048, 8192)], ids=lambda s: f"{s[0]}x{s[1]}")  # Llama-3.2-1B's MLP
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def bench_small_linear(row, backend, device, rows, shape, dtype):
    _bench(row, backend, device, rows, shape, dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(8192, 2048), (2048, 8192)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def bench_quantized_linear(row, backend, rows, shape, bits):
    """Bytes are those of values and scales; from M = 4 on the integer products take longer than reading them."""
    n, c = shape
    x = torch.randn(rows, c, dtype=torch.bfloat16)
    out = torch.empty(rows, n, dtype=torch.bfloat16)
    weight = quantize(torch.randn(n, c) / c**0.5, bits)
    weights = rotated(
        lambda: weight._replace(values=weight.values.clone(), scale=weight.scale.clone()), weight.nbytes, "cpu"
    )
    assert_close(small_linear(x, weight), reference.small_linear(x, weight), x.dtype)
    row([lambda w=w: small_linear(x, w, out=out) for w in weights], weight.nbytes)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(28672, 4096), (4096, 14336)], ids=lambda s: f"{s[0]}x{s[1]}")  # Llama-3-8B's
@pytest.mark.parametrize("rows", [1, 8, 16, 64])
def bench_large_linear(row, backend, device, rows, shape):
    _bench(row, backend, device, rows, shape, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", [(8192, 2048), (14336, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
def bench_gated_linear(row, backend, device, rows, shape):
    """Gate and up, normed, and SwiGLU: an MLP's first half."""
    n, c = shape
    x, norm = (
        torch.randn(rows, c, dtype=torch.bfloat16, device=device),
        torch.ones(c, dtype=torch.bfloat16, device=device),
    )
    size = 2 * n * c * 2
    pairs = rotated(lambda: torch.randn(2, n, c, dtype=torch.bfloat16, device=device) / c**0.5, size, device)
    if backend == "torch":

        def mlp(w):
            gate, up = F.linear(F.rms_norm(x, (c,), norm, 1e-5), w.flatten(0, 1)).chunk(2, 1)
            return F.silu(gate) * up

        row([lambda w=w: mlp(w) for w in pairs], size, device)
        return
    call = dict(norm=(norm, 1e-5), swiglu=True)
    assert_close(small_linear(x, list(pairs[0]), **call), reference.small_linear(x, list(pairs[0]), **call), x.dtype)
    row([lambda w=list(pair): small_linear(x, w, **call) for pair in pairs], size, device)


def _bench(row, backend, device, rows, shape, dtype):
    n, c = shape
    x = torch.randn(rows, c, dtype=dtype, device=device)
    out = torch.empty(rows, n, dtype=dtype, device=device)
    size = n * c * dtype.itemsize
    weights = rotated(lambda: torch.randn(n, c, dtype=dtype, device=device) / c**0.5, size, device)
    if backend == "torch":
        row([lambda w=w: F.linear(x, w) for w in weights], size, device)
        return
    assert_close(small_linear(x, weights[0]), reference.small_linear(x, weights[0]), dtype)
    row([lambda w=w: small_linear(x, w, out=out) for w in weights], size, device)
