import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import swiglu


@pytest.mark.parametrize("rows", [1, 8, 512])
def bench_swiglu(row, backend, device, rows):
    dtype, width = torch.bfloat16, 8192
    size = 3 * rows * width * dtype.itemsize
    inputs = rotated(lambda: [torch.randn(rows, width, dtype=dtype, device=device) for _ in range(3)], size, device)
    if backend == "torch":
        row([lambda g=g, u=u: F.silu(g) * u for g, u, _ in inputs], size, device)
        return
    gate, up, _ = inputs[0]
    assert_close(swiglu(gate, up), reference.swiglu(gate, up), dtype)
    row([lambda g=g, u=u, o=o: swiglu(g, u, out=o) for g, u, o in inputs], size, device)
