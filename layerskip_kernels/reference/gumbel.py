"""Coupled noise: a fixed function of (seed, stream, position, token)."""

import torch

from layerskip_kernels.reference.philox import philox, words


def gumbel_noise(seed, stream, position, vocab):
    """Standard Gumbel noise [N, V] float32 for the rows' (seed, stream, position), all int64 [N].

    Word token % 4 of `random_words` at index token // 4, w, gives ``v = (w + 0.5) · 2⁻³²`` in float32, at most
    1 - 2⁻²⁴, and ``-log(-log1p(-v))``: fine-grained in the upper tail, the one that wins.
    """
    token = torch.arange((vocab + 3) // 4, device=seed.device)
    word = torch.stack(random_words(seed, stream, position, token), dim=-1).flatten(1)[:, :vocab]
    uniform = ((word.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def random_words(seed, stream, position, index):
    """Four words, int64 [N, M], for each of the rows' (seed, stream, position) [N] and each index [M] below 2³².

    Philox key: the seed's two words. Counter: (index, position's low word, stream's low word, position's high word xor
    (stream's high word rotated left by 16)).
    """
    position_low, position_high = words(position[:, None])
    stream_low, stream_high = words(stream[:, None])
    mixed = position_high ^ ((stream_high << 16 | stream_high >> 16) & 0xFFFFFFFF)
    return philox((index[None], position_low, stream_low, mixed), words(seed[:, None]))
