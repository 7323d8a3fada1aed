from __future__ import annotations

from dataclasses import dataclass, field

import torch

from layerskip_kernels.decode.profile import Phase


@dataclass
class GenerationStats:
    """What a call to `generate` did. A round of a batch counts once for every sequence in it."""

    prefill_seconds: float = 0.0
    tokens: int = 0  # emitted, the first token of each sequence (from its prefill) included
    decode_tokens: int = 0  # emitted by rounds
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0  # drafts that were emitted
    drafted_at: list[int] = field(
        default_factory=list
    )  # [K]: rounds that reached draft position i, all before accepted
    accepted_at: list[int] = field(default_factory=list)  # [K]: rounds that accepted it
    round_seconds: list[float] = field(default_factory=list)  # of every round of the whole batch
    phases: dict[str, Phase] | None = None  # with profile=True: what the rounds spent where

    @property
    def decode_seconds(self) -> float:
        """All rounds together."""
        return sum(self.round_seconds)

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def position_acceptance(self) -> list[float | None]:
        """[K]: share of drafts accepted at each position, given that all before it were."""
        return [a / d if d else None for a, d in zip(self.accepted_at, self.drafted_at)]

    @property
    def tokens_per_round(self) -> float | None:
        return self.decode_tokens / self.rounds if self.rounds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens emitted by rounds over the time spent in them, prefill left out."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    def count_round(self, num_draft: int, num_emitted: int, num_accepted: int) -> None:
        self.rounds += 1
        self.tokens += num_emitted
        self.decode_tokens += num_emitted
        self.drafted += num_draft
        self.accepted += num_accepted
        for i in range(min(num_accepted + 1, num_draft)):
            self.drafted_at[i] += 1
            self.accepted_at[i] += i < num_accepted


@dataclass
class GenerationResult:
    """What `generate` returns, one entry per prompt, in their order."""

    sequences: list[list[int]]  # new tokens only, EOS included
    text: list[str] | None  # None without a tokenizer
    finish_reasons: list[str]  # "eos", "length", "stop_string", "stopping_criteria" or "interrupted"
    stats: GenerationStats
    logits: list[torch.Tensor] | None = None  # [n, V] float32 each: what its tokens were chosen from; if asked for

    @property
    def interrupted(self) -> bool:
        """Ctrl-C stopped it; the sequences hold what there was."""
        return "interrupted" in self.finish_reasons
