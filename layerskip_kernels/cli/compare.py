"""Self-speculative beside autoregressive decoding of the same prompts, in turns, so that a noisy machine hits both."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

STRATEGIES = ("autoregressive", "self_speculative")
ROUNDS = 3


def compare(generate: Callable[[str], Any], *, same_tokens: bool) -> bool:
    """Prints tokens/s of both strategies, medians of three runs each, and their ratio; True when Ctrl-C stopped it.

    `generate` decodes with the strategy it is given and returns the result; `same_tokens`: both should say the same.
    """
    speeds: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    answers: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for strategy in STRATEGIES:
            result = generate(strategy)
            if result.interrupted:
                return True
            answers[strategy] = result.sequences
            speeds[strategy].append(result.stats.tokens_per_second or 0.0)
    plain, speculative = (statistics.median(speeds[strategy]) for strategy in STRATEGIES)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("compared", no_wrap=True)
    for name in ("tok/s", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    ratio = speculative / plain if plain else None  # an answer of one token has no decoding to time
    table.add_row("autoregressive", f"{plain:.1f}", "")
    table.add_row("self_speculative", f"{speculative:.1f}", "n/a" if ratio is None else f"{ratio:.2f} x")
    console = Console(stderr=True, highlight=False)
    console.print(table)
    if same_tokens:
        same = answers["autoregressive"] == answers["self_speculative"]
        console.print("same tokens" if same else "DIFFERENT tokens: please report this")
    return False
