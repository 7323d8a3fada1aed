import pytest
import torch
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import swiglu


@pytest.mark.parametrize("rows", [1, 8, 512])
def bench_swiglu(row, backend, rows):
    dtype, width = torch.bfloat16, 8192
    size = 3 * rows * width * dtype.itemsize
    inputs = rotated(lambda: [torch.randn(rows, width, dtype=dtype) for _ in range(3)], size)
    gate, up, _ = inputs[0]
    assert_close(swiglu(gate, up), reference.swiglu(gate, up), dtype)
    row([lambda g=g, u=u, o=o: swiglu(g, u, out=o) for g, u, o in inputs], size)
