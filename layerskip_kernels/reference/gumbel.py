"""Coupled noise: a fixed function of (seed, stream, position, token)."""

import torch

from layerskip_kernels.reference.philox import philox, words


def gumbel_noise(seed, stream, position, vocab):
    """Standard Gumbel noise [N, V] float32 for the rows' (seed, stream, position), all int64 [N].

    Philox key: the seed's two words. Counter: (token // 4, position's low word, stream's low word, position's high
    word xor (stream's high word rotated left by 16)). Output word token % 4, w, gives ``v = (w + 0.5) · 2⁻³²`` in
    float32, at most 1 - 2⁻²⁴, and ``-log(-log1p(-v))``: fine-grained in the upper tail, the one that wins.
    """
    token = torch.arange((vocab + 3) // 4, device=seed.device)
    seed_words = words(seed[:, None])
    position_low, position_high = words(position[:, None])
    stream_low, stream_high = words(stream[:, None])
    mixed = position_high ^ ((stream_high << 16 | stream_high >> 16) & 0xFFFFFFFF)
    output = philox((token[None], position_low, stream_low, mixed), seed_words)
    word = torch.stack(output, dim=-1).flatten(1)[:, :vocab]
    uniform = ((word.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))
