import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import rms_norm


@pytest.mark.parametrize("rows, width", [(1, 2048), (8, 2048), (512, 2048)])
def bench_rms_norm(row, backend, device, rows, width):
    dtype = torch.bfloat16
    weight = torch.randn(width, dtype=dtype, device=device)
    size = rows * width * dtype.itemsize
    inputs = rotated(lambda: [torch.randn(rows, width, dtype=dtype, device=device) for _ in range(2)], 2 * size, device)
    if backend == "torch":
        row([lambda x=x: F.rms_norm(x, weight.shape, weight, 1e-5) for x, _ in inputs], 2 * size, device)
        return
    x = inputs[0][0]
    assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    row([lambda x=x, out=out: rms_norm(x, weight, 1e-5, out=out) for x, out in inputs], 2 * size, device)
