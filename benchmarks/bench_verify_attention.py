import pytest
import torch
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import verify_attention


@pytest.mark.parametrize("context", [256, 4096, 16384])
@pytest.mark.parametrize("window", [1, 7])
def bench_verify_attention(row, backend, context, window):
    dtype, heads, groups, dim = torch.bfloat16, 32, 8, 64
    q = torch.randn(1, window, heads, dim, dtype=dtype)
    size = 2 * groups * (context + window) * dim * dtype.itemsize
    caches = rotated(lambda: [torch.randn(1, groups, context + window, dim, dtype=dtype) for _ in "kv"], size)
    arguments = dict(lengths=torch.tensor([context], dtype=torch.int32), scale=dim**-0.5)
    out = torch.empty_like(q)
    assert_close(
        verify_attention(q, *caches[0], **arguments), reference.verify_attention(q, *caches[0], **arguments), dtype
    )
    row([lambda c=c: verify_attention(q, *c, **arguments, out=out) for c in caches], size)
