"""Coupled noise on the GPU: reference/philox.py bit for bit, reference/gumbel.py to the last digits of two logarithms.

Keyed by tensors alone, so a captured graph draws fresh numbers on every replay.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of broadcastable uint32 counters and keys: four uint32 words."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32)), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32)), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel_noise(seed, stream, position, first, TOKENS: tl.constexpr):
    """Noise [R, TOKENS] of the tokens from `first` on; seed, stream, position: int64 [R]. Multiples of 4, both."""
    counter = (first // 4 + tl.arange(0, TOKENS // 4)).to(tl.uint32)[None, :]
    stream_high = (stream >> 32).to(tl.uint32)
    mixed = (position >> 32).to(tl.uint32) ^ ((stream_high << 16) | (stream_high >> 16))
    zero = tl.zeros((seed.shape[0], TOKENS // 4), tl.uint32)
    w0, w1, w2, w3 = philox(
        zero + counter,
        zero + position.to(tl.uint32)[:, None],
        zero + stream.to(tl.uint32)[:, None],
        zero + mixed[:, None],
        seed.to(tl.uint32)[:, None],
        (seed >> 32).to(tl.uint32)[:, None],
    )
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # (word + 0.5) · 2⁻³², rounded once, at most 1 - 2⁻²⁴
    uniform = tl.minimum((word.to(tl.int64) * 2 + 1).to(tl.float32) * 2.0**-33, 1 - 2.0**-24)
    rest = 1.0 - uniform
    # -log1p(-uniform): log(rest), and what rounding 1 - uniform to `rest` left out
    exponential = ((rest - 1.0) + uniform) / rest - tl.log(rest)
    return -tl.log(exponential)
