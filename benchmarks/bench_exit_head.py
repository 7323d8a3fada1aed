import pytest
import torch
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import ExitHead, Sampling, exit_head

SHAPES = {"smollm2": (49152, 576), "llama3.2-1b": (128256, 2048)}


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 8])
def bench_exit_head(row, backend, rows, shape, sampled):
    dtype = torch.bfloat16
    vocab, width = SHAPES[shape]
    hidden, norm = torch.randn(rows, width, dtype=dtype), torch.ones(width, dtype=dtype)
    size = vocab * width * dtype.itemsize
    heads = rotated(lambda: torch.randn(vocab, width, dtype=dtype) / width**0.5, size)
    index = torch.arange(rows)
    sampling = Sampling(torch.full((rows,), 0.7), index, index) if sampled else None
    expected = reference.exit_head(hidden, norm, heads[0], eps=1e-5, sampling=sampling)
    actual = exit_head(hidden, norm, heads[0], eps=1e-5, sampling=sampling)
    assert_close(actual.logprob, expected.logprob, dtype)
    assert torch.equal(actual.token, expected.token)
    out = ExitHead(torch.empty_like(index), torch.empty(rows), torch.empty(rows))
    row([lambda h=h: exit_head(hidden, norm, h, eps=1e-5, sampling=sampling, out=out) for h in heads], size)
