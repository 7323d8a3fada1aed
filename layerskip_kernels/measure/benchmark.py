"""Several ways of decoding over the same prompts, in turns: what each took, and what it said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerskip_kernels.datasets import Sample
from layerskip_kernels.measure.statistics import summary


@dataclass
class Call:
    """One call that decoded some of the prompts together."""

    samples: list[int]  # their numbers
    sequences: list[list[int]]
    texts: list[str]
    time_to_first_token: float | None  # seconds
    decode_seconds: float
    decode_tokens: int  # after the first of each sequence
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        return self.decode_tokens / self.decode_seconds if self.decode_tokens and self.decode_seconds else None


# decodes prompts, whose first has the number `first`; None after Ctrl-C
Way = Callable[[Sequence[Any], int], "Call | None"]


def ours(decoder: Any, strategy: str, options: dict[str, Any]) -> Way:
    """`SelfSpeculativeDecoder.generate` with a strategy. Prompt i has the stream (seed, i), in whichever call it is."""

    def decode(prompts: Sequence[Any], first: int) -> Call | None:
        seed = options.get("seed")
        seeds = None if seed is None else [seed + first + i for i in range(len(prompts))]
        result = decoder.generate(prompts, generation_strategy=strategy, **options | {"seed": seeds})
        if result.interrupted:
            return None
        stats = result.stats
        speculative = strategy == "self_speculative"
        return Call(
            list(range(first, first + len(prompts))),
            result.sequences,
            result.text,
            stats.prefill_seconds,
            stats.decode_seconds,
            stats.decode_tokens,
            stats.rounds if speculative else None,
            stats.drafted if speculative else None,
            stats.accepted if speculative else None,
            stats.drafted_at,
            stats.accepted_at,
        )

    return decode


def run(
    ways: dict[str, Way],
    samples: Sequence[Sample],
    *,
    batch_size: int,
    warmup: int,
    tick: Callable[[dict[str, list[Call]], int], None],
) -> tuple[dict[str, list[Call]], bool]:
    """The calls of every way of decoding, and whether Ctrl-C ended it; what was measured until then stays.

    Every way decodes the same `batch_size` prompts before any goes on to the next ones, and they take turns at being
    first. `warmup` calls of each come before and are not counted. `tick(calls, prompts)` is told about progress.
    """
    found: dict[str, list[Call]] = {name: [] for name in ways}
    names = list(ways)
    starts = list(range(0, len(samples), batch_size))
    try:
        for number, start in enumerate([*starts[:1] * warmup, *starts], -warmup):
            prompts = [sample.prompt for sample in samples[start : start + batch_size]]
            turn = number % len(names)
            calls = {}
            for name in names[turn:] + names[:turn]:
                calls[name] = ways[name](prompts, start)
                if calls[name] is None:
                    return found, True
            if number >= 0:
                for name in names:
                    found[name].append(calls[name])
                tick(found, len(prompts))
    except KeyboardInterrupt:
        return found, True
    return found, False


def summarize(calls: Sequence[Call], baseline: Sequence[Call], seed: int) -> dict[str, Any]:
    """Figures of one way of decoding; `ratio` and `same_tokens` compare it with the `baseline`, call by call."""
    speeds = [call.tokens_per_second for call in calls if call.tokens_per_second]
    firsts = [call.time_to_first_token for call in calls if call.time_to_first_token is not None]
    pairs = [(ours.tokens_per_second, theirs.tokens_per_second) for ours, theirs in zip(calls, baseline)]
    tokens, seconds = sum(call.decode_tokens for call in calls), sum(call.decode_seconds for call in calls)
    same = [a == b for x, y in zip(calls, baseline) for a, b in zip(x.sequences, y.sequences)]
    found = {
        "samples": len(same),
        "tokens": sum(len(ids) for call in calls for ids in call.sequences),
        "decode_tokens": tokens,
        "decode_seconds": seconds,
        "total_tokens_per_second": tokens / seconds if seconds else None,
        "tokens_per_second": summary(speeds, seed),
        "time_per_token": summary([1 / speed for speed in speeds], seed),
        "time_to_first_token": summary(firsts, seed),
        "ratio": summary([a / b for a, b in pairs if a and b], seed),
        "same_tokens": sum(same),
    }
    if any(call.rounds for call in calls):
        found |= _acceptance(calls)
    return found


def _acceptance(calls: Sequence[Call]) -> dict[str, Any]:
    drafted, accepted, rounds = (
        sum(getattr(call, name) for call in calls) for name in ("drafted", "accepted", "rounds")
    )
    width = max(len(call.drafted_at) for call in calls)
    reached, passed = (
        [sum(getattr(call, name)[i] for call in calls if i < len(getattr(call, name))) for i in range(width)]
        for name in ("drafted_at", "accepted_at")
    )
    return {
        "acceptance_rate": accepted / drafted if drafted else None,
        "position_acceptance": [a / b if b else None for a, b in zip(passed, reached)],
        "tokens_per_round": sum(call.decode_tokens for call in calls) / rounds,
    }
