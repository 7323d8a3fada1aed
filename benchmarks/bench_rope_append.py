import pytest
import torch
from conftest import assert_close

from layerskip_kernels import reference
from layerskip_kernels.ops import rope_append

TORCH = False  # no one operation rotates and appends


@pytest.mark.parametrize("batch, window", [(1, 1), (1, 7), (8, 7)])
def bench_rope_append(row, backend, device, batch, window):
    dtype, heads, groups, dim, capacity = torch.bfloat16, 32, 8, 64, 1024
    q = torch.randn(batch, window, heads, dim, dtype=dtype, device=device)
    k, v = (torch.randn(batch, window, groups, dim, dtype=dtype, device=device) for _ in "kv")
    k_cache, v_cache = (torch.zeros(batch, groups, capacity, dim, dtype=dtype, device=device) for _ in "kv")
    lengths = torch.arange(batch, dtype=torch.int32, device=device) * 7 + 500
    arguments = dict(
        lengths=lengths,
        positions=lengths[:, None] + torch.arange(window, dtype=torch.int32, device=device),
        inv_freq=10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim),
    )
    expected = q.clone()
    reference.rope_append(expected, k, v, k_cache.clone(), v_cache.clone(), **arguments)
    actual = q.clone()
    rope_append(actual, k, v, k_cache, v_cache, **arguments)
    assert_close(actual, expected, dtype)
    moved = 2 * (q.numel() + k.numel() + v.numel()) * dtype.itemsize
    row([lambda: rope_append(q, k, v, k_cache, v_cache, **arguments)], moved, device)
