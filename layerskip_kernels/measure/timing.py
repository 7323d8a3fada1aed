"""Decoding speeds, of several ways of decoding in turns, so that a noisy machine hits all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from layerskip_kernels.measure.settings import Setting

PLAIN = {"generation_strategy": "autoregressive"}


def fastest(
    decoder, prompts: Sequence[Sequence[int]], choices: Sequence[Setting], *, repeats: int, **options
) -> list[tuple[Setting | None, float]]:
    """(setting, tokens per second) of every choice and of autoregressive decoding (None), on this machine, best first.

    Up to `decoder.max_batch_size` prompts are decoded together. The figures are medians over `repeats`; `options` go to
    `generate`.
    """
    speeds: dict[Setting | None, list[float]] = {choice: [] for choice in (None, *choices)}
    size = decoder.max_batch_size
    for repeat in range(repeats + 1):
        for choice, speed in speeds.items():
            how = PLAIN
            if choice:
                how = dict(exit_layer=choice.exit_layer, num_speculations=choice.num_speculations)
            tokens = seconds = 0
            for start in range(0, len(prompts), size):
                stats = decoder.generate(prompts[start : start + size], **options, **how).stats
                tokens, seconds = tokens + stats.decode_tokens, seconds + stats.decode_seconds
            if repeat and seconds:  # the first one warms up
                speed.append(tokens / seconds)
    medians = [(choice, statistics.median(speed)) for choice, speed in speeds.items() if speed]
    return sorted(medians, key=lambda pair: -pair[1])
