"""The coupled noise of the Triton kernels against the reference: a GPU, or Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from layerskip_kernels import registry
from layerskip_kernels.reference import gumbel
from layerskip_kernels.reference import philox as reference
from layerskip_kernels.triton.philox import gumbel_noise, philox

BACKEND = "triton"
INTERPRETED = registry.why_not("triton", "swiglu", torch.device("cpu"), torch.float32) is None
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@triton.jit
def philox_kernel(words_ptr, out_ptr, N: tl.constexpr):
    """words: [6, N] counters and keys as int64; out: [4, N]."""
    i = tl.arange(0, N)
    c0 = tl.load(words_ptr + i).to(tl.uint32)
    c1 = tl.load(words_ptr + N + i).to(tl.uint32)
    c2 = tl.load(words_ptr + 2 * N + i).to(tl.uint32)
    c3 = tl.load(words_ptr + 3 * N + i).to(tl.uint32)
    k0 = tl.load(words_ptr + 4 * N + i).to(tl.uint32)
    k1 = tl.load(words_ptr + 5 * N + i).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + i, w0.to(tl.int64))
    tl.store(out_ptr + N + i, w1.to(tl.int64))
    tl.store(out_ptr + 2 * N + i, w2.to(tl.int64))
    tl.store(out_ptr + 3 * N + i, w3.to(tl.int64))


@triton.jit
def gumbel_kernel(seed_ptr, stream_ptr, position_ptr, out_ptr, first, R: tl.constexpr, TOKENS: tl.constexpr):
    row = tl.arange(0, R)
    seed, stream, position = tl.load(seed_ptr + row), tl.load(stream_ptr + row), tl.load(position_ptr + row)
    noise = gumbel_noise(seed, stream, position, first, TOKENS)
    tl.store(out_ptr + row[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :], noise)


def test_words_equal_the_reference():
    words = torch.randint(0, 2**32, (6, 256), generator=torch.Generator().manual_seed(0))
    words[:, :3] = torch.tensor([0, 2**32 - 1, 2**31])
    out = torch.empty(4, 256, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](words.to(DEVICE), out, N=256)
    expected = torch.stack(reference.philox(list(words[:4]), list(words[4:])))
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("first", [0, 64, 262080])
def test_noise_equals_the_reference(first):
    """Negative and 64-bit seeds, streams and positions included."""
    rows = [(0, 0, 0), (1, 2, 3), (-1, -2, 7), (2**40 + 5, 2**35 + 1, 2**33), (-(2**63), 2**63 - 1, 131071)]
    rows += [(7, 8, 9 + i) for i in range(11)]
    columns = [torch.tensor([row[i] for row in rows]) for i in range(3)]
    out = torch.empty(16, 64, device=DEVICE)
    gumbel_kernel[(1,)](*(c.to(DEVICE) for c in columns), out, first, R=16, TOKENS=64)
    expected = gumbel.gumbel_noise(*columns, first + 64)[:, first:]
    torch.testing.assert_close(out.cpu(), expected, atol=2e-6, rtol=2e-6)
