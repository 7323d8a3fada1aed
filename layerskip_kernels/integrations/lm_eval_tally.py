"""What an evaluation made a model do."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from layerskip_kernels.decode.result import GenerationStats


class Tally:
    """Generated and rated text of all calls together."""

    def __init__(self, speculative: bool):
        self.speculative = speculative
        self.answers = self.scored = self.scored_tokens = 0
        self.scoring_seconds = 0.0
        self.stats = GenerationStats()

    def count_generated(self, answers: int, stats: GenerationStats) -> None:
        self.answers += answers
        total = self.stats
        for name in ("prefill_seconds", "tokens", "decode_tokens", "rounds", "drafted", "accepted"):
            setattr(total, name, getattr(total, name) + getattr(stats, name))
        for name in ("drafted_at", "accepted_at"):
            both = zip_longest(getattr(total, name), getattr(stats, name), fillvalue=0)
            setattr(total, name, [a + b for a, b in both])
        total.round_seconds = [total.decode_seconds + stats.decode_seconds]  # of millions of rounds, only the sum

    def count_scored(self, tokens: int, seconds: float) -> None:
        self.scored += 1
        self.scored_tokens += tokens
        self.scoring_seconds += seconds

    def report(self) -> dict[str, Any]:
        """`generation` and `loglikelihood`, where there was any; seconds are of the model alone."""
        found: dict[str, Any] = {}
        if self.answers:
            names = ["tokens", "prefill_seconds", "decode_tokens", "decode_seconds", "tokens_per_second"]
            if self.speculative:
                names += ["rounds", "drafted", "accepted", "acceptance_rate", "tokens_per_round", "position_acceptance"]
            found["generation"] = {"answers": self.answers, **{name: getattr(self.stats, name) for name in names}}
        if self.scored:
            found["loglikelihood"] = {
                "texts": self.scored,
                "tokens": self.scored_tokens,
                "seconds": self.scoring_seconds,
                "texts_per_second": self.scored / self.scoring_seconds,
            }
        return found
