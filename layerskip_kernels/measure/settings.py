"""What an exit layer and a number of drafts are worth: rounds simulated from one teacher-forced pass, and recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerskip_kernels.files import write_whole
from layerskip_kernels.measure.lens import LayerReport
from layerskip_kernels.models.tuned import write_choice

MAX_SPECULATIONS = 12  # K is looked for in 1..12


@dataclass(frozen=True)
class Setting:
    """(E, K), what it accepts on the model's own text, and what that is worth."""

    exit_layer: int
    num_speculations: int
    acceptance_rate: float  # accepted / drafted
    position_acceptance: float  # accepted / positions decided: alpha
    tokens_per_round: float
    ceiling: float  # expected speed-up over autoregressive decoding when time is bytes of weights read


def simulate(agreed: Sequence[bool], num_speculations: int) -> tuple[int, int, int, int]:
    """Self-speculative rounds over a text of which `agreed[n]` tells whether the exit drafts token n right.

    One pass decides all drafts: a draft is only looked at where every token before it was right.
    Returns (rounds, drafted, accepted, decided): `decided` counts accepted drafts and first wrong ones.
    """
    rounds = drafted = accepted = decided = 0
    position = 1  # prefill gives the first token
    while position < len(agreed):
        # the last token of a text is never drafted: verification gives it anyway
        window = agreed[position : min(position + num_speculations, len(agreed) - 1)]
        right = next((n for n, same in enumerate(window) if not same), len(window))
        rounds, drafted, accepted = rounds + 1, drafted + len(window), accepted + right
        decided += min(right + 1, len(window))
        position += right + 1
    return rounds, drafted, accepted, decided


def settings(
    decoder,
    agreed: Sequence[list[list[bool]]],
    exit_layers: Sequence[int] | None = None,
    speculations: Sequence[int] = range(1, MAX_SPECULATIONS + 1),
) -> list[Setting]:
    """Every (E, K) over the texts' `Lens.drafts()`, the highest ceiling first; none where nothing is drafted.

    The ceiling is tokens per round over 1 + K d, where d is the share of the model's weights that a draft step reads:
    exit layers and the head that drafts.
    """
    found = []
    for exit_layer in exit_layers or range(1, decoder.config.num_layers):
        draft = decoder.model.draft_share(exit_layer)
        for num_speculations in speculations:
            counts = [simulate(text[exit_layer - 1], num_speculations) for text in agreed]
            rounds, drafted, accepted, decided = (sum(column) for column in zip(*counts))
            if not rounds or not drafted:
                continue
            per_round = (rounds + accepted) / rounds
            found.append(
                Setting(
                    exit_layer,
                    num_speculations,
                    accepted / drafted,
                    accepted / max(decided, 1),
                    per_round,
                    per_round / (1 + num_speculations * draft),
                )
            )
    return sorted(found, key=lambda s: -s.ceiling)


def record(folder: Path, setting: Setting, layers: Sequence[LayerReport], **more: Any) -> None:
    """Writes (E, K) into the checkpoint's config.json, where decoding finds it, and all figures into exits.json."""
    write_choice(folder, {"exit_layer": setting.exit_layer, "num_speculations": setting.num_speculations})
    report = {"setting": asdict(setting), "layers": [asdict(layer) for layer in layers], **more}
    write_whole(folder / "exits.json", (json.dumps(report, indent=2) + "\n").encode())
