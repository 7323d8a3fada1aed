"""Decoding speeds, of several ways of decoding in turns, so that a noisy machine hits all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from layerskip_kernels.measure.settings import Setting

PLAIN = {"generation_strategy": "autoregressive"}


def how(setting: Setting | None) -> dict[str, Any]:
    """The arguments of `generate` for a setting; None is autoregressive decoding."""
    if setting is None:
        return PLAIN
    return dict(exit_layer=setting.exit_layer, num_speculations=setting.num_speculations)


def fastest(
    decoder: Any,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Setting],
    *,
    repeats: int,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[tuple[Setting | None, float]]:
    """(setting, tokens per second) of every choice and of autoregressive decoding (None), on this machine, best first.

    Up to `decoder.max_batch_size` prompts are decoded together, by every choice before the next ones are. The repeats
    of a call do the same work round by round, so each round counts with the least time it took: the machine
    undisturbed. `options` go to `generate`, with a seed if they sample; `tick()` is called after every repeat.
    """
    size = decoder.max_batch_size
    tokens, seconds = 0, dict.fromkeys((None, *choices), 0.0)
    for start in range(0, len(prompts), size):
        rounds: dict[Setting | None, list[list[float]]] = {choice: [] for choice in seconds}
        for _ in range(repeats):
            for choice, times in rounds.items():
                stats = decoder.generate(prompts[start : start + size], **options, **how(choice)).stats
                times.append(stats.round_seconds)
            tick()
        tokens += stats.decode_tokens
        for choice, times in rounds.items():
            seconds[choice] += sum(map(min, zip(*times)))
    speeds = [(choice, tokens / total) for choice, total in seconds.items() if tokens]
    return sorted(speeds, key=lambda pair: -pair[1])
