"""What a generation did: the table on standard error, the record on disk."""

from __future__ import annotations

import json
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from layerskip_kernels.files import write_whole

_STATS = (
    "prefill_seconds",
    "decode_seconds",
    "tokens",
    "rounds",
    "drafted",
    "accepted",
    "acceptance_rate",
    "position_acceptance",
    "tokens_per_round",
    "tokens_per_second",
)


def print_stats(decoder: Any, strategy: str, stats: Any) -> None:
    """One table row per call. E: exit layer, K: drafted tokens per round; n/a where the strategy has none."""
    speculative = strategy == "self_speculative"
    cells = {
        "strategy": strategy,
        "E": None if strategy == "autoregressive" else decoder.exit_layer,
        "K": decoder.num_speculations if speculative else None,
        "tokens": stats.tokens,
        "tok/s": _format(stats.tokens_per_second, "{:.1f}"),
        "acceptance": _format(stats.acceptance_rate if speculative else None, "{:.1%}"),
        "rounds": stats.rounds if speculative else None,
        "prefill ms": _format(stats.prefill_seconds, "{:.1f}", scale=1000),
    }
    table = _table(*cells)
    table.add_row(*("n/a" if cell is None else str(cell) for cell in cells.values()))
    _print(table)


def print_phases(stats: Any) -> None:
    """What the rounds spent in each phase; the rest of their time is Python. GB/s: of weights, read once a call."""
    table = _table("phase", "calls", "us/call", "ms", "share", "GB/s")
    total = stats.decode_seconds
    for name, phase in stats.phases.items():
        table.add_row(
            name,
            str(phase.calls),
            f"{phase.seconds / phase.calls * 1e6:.1f}",
            f"{phase.seconds * 1e3:.1f}",
            f"{phase.seconds / total:.1%}",
            f"{phase.weight_bytes / phase.seconds / 1e9:.1f}" if phase.weight_bytes else "",
        )
    rest, rounds = total - sum(phase.seconds for phase in stats.phases.values()), len(stats.round_seconds)
    table.add_row("Python", str(rounds), f"{rest / rounds * 1e6:.1f}", f"{rest * 1e3:.1f}", f"{rest / total:.1%}", "")
    _print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console(stderr=True)
    console.print(table, width=max(console.width, 80), crop=False)  # on a narrow terminal it wraps but loses nothing


def _format(value: float | None, pattern: str, scale: float = 1.0) -> str | None:
    return None if value is None else pattern.format(value * scale)


class Record:
    """All answers of one run as JSON in a folder; written anew, whole, after each call."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        # found out now rather than after the model ran
        with tempfile.TemporaryFile(dir=folder):
            pass
        self.path = folder / f"generate_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}.json"
        self._content: dict[str, Any] = {"settings": settings, "calls": []}

    def add(self, prompts: list[str], result: Any) -> None:
        answers = zip(prompts, result.text, result.sequences, strict=True)
        self._content["calls"].append(
            {
                "answers": [{"prompt": p, "text": text, "tokens": list(map(int, ids))} for p, text, ids in answers],
                "interrupted": result.interrupted,
                "stats": {name: getattr(result.stats, name) for name in _STATS},
            }
        )
        write_whole(self.path, (json.dumps(self._content, indent=2, ensure_ascii=False) + "\n").encode())
