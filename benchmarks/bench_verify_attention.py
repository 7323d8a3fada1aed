import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import verify_attention


@pytest.mark.parametrize("context", [256, 4096, 16384])
@pytest.mark.parametrize("window", [1, 7])
def bench_verify_attention(row, backend, device, context, window):  # Llama-3.2-1B
    _bench(row, backend, device, 1, window, context, dim=64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "context"), [(1, 1024), (1, 4096), (1, 16384), (1, 32768), (16, 1024), (16, 8192), (64, 1024), (64, 4096)]
)
@pytest.mark.parametrize("window", [1, 7, 16])
def bench_large_attention(row, backend, device, batch, context, window):  # Llama-3-8B
    _bench(row, backend, device, batch, window, context, dim=128)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "context"), [(1, 4096), (1, 32768), (16, 8192), (64, 4096)])
@pytest.mark.parametrize("window", [1, 7, 16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def bench_flex_attention(row, batch, context, window):  # torch's FlexAttention on the shapes of Llama-3-8B
    _bench(row, "flex", "cuda", batch, window, context, dim=128)


def _bench(row, backend, device, batch, window, context, dim, heads=32, groups=8):
    dtype, length = torch.bfloat16, context + window
    q = torch.randn(batch, window, heads, dim, dtype=dtype, device=device)
    size = 2 * batch * groups * length * dim * dtype.itemsize
    caches = rotated(
        lambda: [torch.randn(batch, groups, length, dim, dtype=dtype, device=device) for _ in "kv"], size, device
    )
    arguments = dict(lengths=torch.full((batch,), context, dtype=torch.int32, device=device), scale=dim**-0.5)
    out = torch.empty_like(q)
    if backend in ("torch", "flex"):
        attend = _torch_attention(backend, window, length, device)
        calls = [lambda c=c: attend(q.transpose(1, 2), *c).transpose(1, 2) for c in caches]
    else:
        calls = [lambda c=c: verify_attention(q, *c, **arguments, out=out) for c in caches]
    # The reference holds everything in float32: a few sequences of it are enough.
    some = slice(0, 2)
    few = arguments | dict(lengths=arguments["lengths"][some])
    expected = reference.verify_attention(q[some], *(c[some] for c in caches[0]), **few)
    assert_close(calls[0]()[some], expected, dtype)
    row(calls, size, device)


def _torch_attention(name, window, length, device):
    """Every window row sees the cache and the rows before it: a causal mask aligned at its lower right."""
    if name == "torch":
        from torch.nn.attention.bias import causal_lower_right

        mask = None if window == 1 else causal_lower_right(window, length)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b, h, row, column):
        return column <= length - window + row

    blocks = create_block_mask(sees, None, None, window, length, device=device)
    torch._dynamo.reset()  # after eight shapes it would compile no more and run the rest as they are
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True)
