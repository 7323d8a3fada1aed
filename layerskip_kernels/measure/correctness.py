"""Whether speculation and batching leave every answer as it is: token ids and logits, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Way:
    """How prompts are decoded: E and K of self-speculation, None for autoregressive decoding; alone or together."""

    exit_layer: int | None
    num_speculations: int | None
    together: bool

    @property
    def name(self) -> str:
        drafts = "autoregressive" if self.exit_layer is None else f"E={self.exit_layer} K={self.num_speculations}"
        return f"{drafts}, {'in a batch' if self.together else 'alone'}"

    @property
    def arguments(self) -> dict[str, Any]:
        if self.exit_layer is None:
            return {"generation_strategy": "autoregressive"}
        return {"exit_layer": self.exit_layer, "num_speculations": self.num_speculations}


BASELINE = Way(None, None, together=False)


@dataclass(frozen=True)
class Difference:
    """The first one between an answer and the baseline's. Positions count new tokens from 0."""

    prompt: int
    way: Way
    position: int  # of the first token that differs; where none does, of the first logits that do
    logits_position: int | None  # of the first logits with a differing bit
    expected: int | None  # tokens at `position`; None where an answer ended before
    got: int | None
    margin: float | None  # between the two best logits of the baseline there

    @property
    def in_tokens(self) -> bool:
        return self.expected != self.got


@dataclass
class Outcome:
    """What was compared so far."""

    prompts: int = 0
    answers: dict[Way, int] = field(default_factory=dict)
    tokens: dict[Way, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    interrupted: bool = False


def ways(exits: Sequence[int], drafts: Sequence[int], together: bool) -> list[Way]:
    """Everything that is compared with the baseline: every exit layer with every number of drafts."""
    found = [Way(None, None, together=True)] if together else []
    for exit_layer in dict.fromkeys(exits):
        for k in dict.fromkeys(drafts):
            found += [Way(exit_layer, k, together=t) for t in ((False, True) if together else (False,))]
    return found


def check(
    decoder: Any,
    prompts: Sequence[Any],
    compared: Sequence[Way],
    options: dict[str, Any],
    *,
    batch_size: int,
    tick: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Compare answers decoded in each way with those of each prompt decoded alone and autoregressively.

    Args:
        decoder: a `SelfSpeculativeDecoder`.
        prompts: as `generate` takes them; prompt i is sampled with the seed `options["seed"] + i`.
        compared: the ways of decoding.
        options: further arguments of `generate`.
        batch_size: prompts decoded together, whose logits of all tokens are held in memory, [n, V] float32 each.
        tick: told after each comparison of one answer.

    Ctrl-C ends it with what was compared; ValueError, TypeError and others are those of `generate`.
    """
    outcome = Outcome(answers=dict.fromkeys(compared, 0), tokens=dict.fromkeys(compared, 0))

    def decode(numbers: Sequence[int], way: Way) -> list[tuple[list[int], torch.Tensor]]:
        seeds = {"seed": [options["seed"] + n for n in numbers]} if options.get("sample") else {}
        asked = [prompts[n] for n in numbers]
        result = decoder.generate(asked, output_logits=True, **{**options, **way.arguments, **seeds})
        if result.interrupted:
            raise KeyboardInterrupt
        return list(zip(result.sequences, result.logits))

    try:
        for start in range(0, len(prompts), batch_size):
            numbers = range(start, min(start + batch_size, len(prompts)))
            expected = {n: decode([n], BASELINE)[0] for n in numbers}
            for way in compared:
                for group in [numbers] if way.together else [[n] for n in numbers]:
                    for n, answer in zip(group, decode(group, way)):
                        outcome.answers[way] += 1
                        outcome.tokens[way] += len(answer[0])
                        outcome.differences += first_difference(n, way, expected[n], answer)
                        tick(outcome)
            outcome.prompts = numbers.stop
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def first_difference(prompt: int, way: Way, expected: tuple, got: tuple) -> list[Difference]:
    """Of (tokens, logits [n, V] float32) of one answer: one difference, or none."""
    (tokens, logits), (other_tokens, other_logits) = expected, got
    common = min(len(tokens), len(other_tokens))
    bits, other_bits = (rows[:common].contiguous().view(torch.int32) for rows in (logits, other_logits))
    unequal = (bits != other_bits).any(-1).nonzero()
    in_logits = unequal[0].item() if len(unequal) else None
    in_tokens = next((i for i in range(common) if tokens[i] != other_tokens[i]), None)
    if in_tokens is None and len(tokens) != len(other_tokens):
        in_tokens = common
    position = in_logits if in_tokens is None else in_tokens
    if position is None:
        return []
    margin = None
    if position < len(tokens):
        best, second = logits[position].topk(2).values.tolist()
        margin = best - second
    token, other = (ids[position] if position < len(ids) else None for ids in (tokens, other_tokens))
    return [Difference(prompt, way, position, in_logits, token, other, margin)]
