"""A grid of exit layers and numbers of drafts, measured cell by cell or predicted from one pass."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from layerskip_kernels.decode import arguments
from layerskip_kernels.files import write_whole
from layerskip_kernels.measure import lens
from layerskip_kernels.measure.costs import Costs
from layerskip_kernels.measure.settings import Setting, settings
from layerskip_kernels.measure.timing import PLAIN


@dataclass(frozen=True)
class Cell:
    """One row of sweep.csv. None: not measured, or not predicted."""

    exit_layer: int
    num_speculations: int
    tokens_per_second: float | None = None
    autoregressive_tokens_per_second: float | None = None
    speedup: float | None = None  # measured
    predicted_speedup: float | None = None
    acceptance_rate: float | None = None
    tokens_per_round: float | None = None
    same_tokens: int | None = None  # answers that are the autoregressive ones
    samples: int | None = None

    @property
    def best_known(self) -> float | None:
        """The measured speed-up, else the predicted one."""
        return self.predicted_speedup if self.speedup is None else self.speedup


def rank(cell: Cell) -> tuple[bool, float]:
    """Sorts the best cells first: those that were measured, the fastest of them first, then the predicted ones."""
    return cell.speedup is None, -(cell.best_known or 0.0)


def read_cells(path: Path) -> list[Cell]:
    """The rows of a sweep.csv. Raises ValueError when it is something else."""
    kinds = {field.name: int if "int" in str(field.type) else float for field in fields(Cell)}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != list(kinds):
            raise ValueError(f"{path} is not a table of a sweep")
        return [Cell(**{name: kinds[name](text) if text else None for name, text in row.items()}) for row in rows]


def write_cells(path: Path, cells: Sequence[Cell]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Cell)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(cell) for cell in cells)
    write_whole(path, text.getvalue().encode())


class Sweep:
    """Cells of a grid on one decoder and one set of autoregressive answers.

    Args:
        decoder: its `max_batch_size` prompts are decoded together.
        prompts: token ids.
        options: arguments of `generate`.
        repeats: of every call. They do the same work round by round, so each round counts with the least time it took.
    """

    def __init__(self, decoder: Any, prompts: Sequence[list[int]], options: dict[str, Any], repeats: int = 1):
        self.decoder, self.prompts, self.options, self.repeats = decoder, prompts, options, repeats
        self.answers: list[list[int]] = []
        self.plain_speed = 0.0
        self._plain_rounds: list[float] | None = None

    def autoregressive(self, *, anew: bool = False) -> None:
        """Times plain decoding. Called again it keeps each round's least time of all calls, or with `anew` its own."""
        self.answers, rounds, counts = self._decode(PLAIN)
        if not counts["decode_tokens"]:
            raise ValueError("the model ends every answer at once, so no decoding can be timed: choose other prompts")
        self._plain_rounds = list(map(min, zip(rounds, rounds if anew else self._plain_rounds or rounds)))
        self.plain_speed = counts["decode_tokens"] / sum(self._plain_rounds)

    def measure(self, exit_layer: int, num_speculations: int) -> Cell:
        """Decodes all prompts with one setting."""
        answers, rounds, stats = self._decode(dict(exit_layer=exit_layer, num_speculations=num_speculations))
        speed = stats["decode_tokens"] / sum(rounds)
        return Cell(
            exit_layer,
            num_speculations,
            speed,
            self.plain_speed,
            speed / self.plain_speed,
            acceptance_rate=stats["accepted"] / stats["drafted"] if stats["drafted"] else None,
            tokens_per_round=stats["decode_tokens"] / stats["rounds"],
            same_tokens=sum(a == b for a, b in zip(answers, self.answers)),
            samples=len(answers),
        )

    def drafts(self, tick: Callable[[], None] = lambda: None) -> list[list[list[bool]]]:
        """What every exit drafts right in the autoregressive answers, from one pass over each."""
        noise = self._sampling()
        found = []
        for prompt, answer, sampling in zip(self.prompts, self.answers, noise):
            found.append(lens.read(self.decoder, prompt, answer, sampling, drafting=True).drafts())
            tick()
        return found

    def _sampling(self) -> list[Any]:
        names = ("sample", "temperature", "top_k", "top_p")
        return arguments.sampling(
            len(self.prompts), *(self.options[name] for name in names), 0.0, self._seeds(0, len(self.prompts))
        )

    def _seeds(self, first: int, count: int) -> list[int]:
        return [self.options["seed"] + first + i for i in range(count)]

    def _decode(self, how: dict[str, Any]) -> tuple[list[list[int]], list[float], dict[str, int]]:
        """Answers, seconds of every round, and counts, of all prompts."""
        answers: list[list[int]] = []
        counts = dict.fromkeys(("decode_tokens", "rounds", "drafted", "accepted"), 0)
        size = self.decoder.max_batch_size
        rounds: list[float] = []
        for start in range(0, len(self.prompts), size):
            prompts = self.prompts[start : start + size]
            options = self.options | how | {"seed": self._seeds(start, len(prompts))}
            times = []
            for _ in range(self.repeats):
                result = self.decoder.generate(prompts, **options)
                if result.interrupted:
                    raise KeyboardInterrupt
                times.append(result.stats.round_seconds)
            rounds += map(min, zip(*times))
            answers += result.sequences
            counts = {name: total + getattr(result.stats, name) for name, total in counts.items()}
        return answers, rounds, counts


def predict(
    decoder: Any, drafts: list[list[list[bool]]], costs: Costs, exit_layers: Sequence[int], speculations: Sequence[int]
) -> list[tuple[Setting, float]]:
    """(setting, predicted speed-up) of every cell, the best first."""
    found = [(s, costs.speedup(s)) for s in settings(decoder, drafts, exit_layers, speculations)]
    return sorted(found, key=lambda pair: -pair[1])
