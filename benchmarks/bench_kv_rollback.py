import pytest
import torch

from layerskip_kernels import reference
from layerskip_kernels.ops import kv_rollback

TORCH = False  # it has no such operation


@pytest.mark.parametrize("kind", ["path", "scrub"])
@pytest.mark.parametrize("batch", [1, 8])
def bench_kv_rollback(row, backend, device, batch, kind):
    """The two kinds that move memory; a chain only adds to the lengths."""
    dtype, layers, groups, dim, capacity, window = torch.bfloat16, 16, 8, 64, 512, 8
    k, v = (torch.randn(layers, batch, groups, capacity, dim).to(device, dtype) for _ in "kv")
    keep = torch.full((batch,), 4, dtype=torch.int32, device=device)
    start = torch.full((batch,), 300, dtype=torch.int32, device=device)
    path = (
        torch.tensor([[7, 3, 0, 5, 0, 0, 0, 0]] * batch, dtype=torch.int32, device=device) if kind == "path" else None
    )
    arguments = dict(window=window, path=path, scrub=kind == "scrub")
    expected = k.clone(), v.clone(), start.clone()
    reference.kv_rollback(*expected, keep, **arguments)
    actual = k.clone(), v.clone(), start.clone()
    kv_rollback(*actual, keep, **arguments)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    lengths = start.clone()

    def call():
        lengths.copy_(start)
        kv_rollback(k, v, lengths, keep, **arguments)

    moved = 2 * layers * batch * groups * 4 * dim * dtype.itemsize * (2 if kind == "path" else 1)
    row([call], moved, device)
