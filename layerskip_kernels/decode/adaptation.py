"""Shorter drafts where longer ones would be in vain. What is emitted does not change, only how fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerskip_kernels.decode.batch import Request
from layerskip_kernels.decode.buffers import Round


class Adaptation:
    """How many tokens each sequence drafts in a round, up to K.

    A draft stops after a token that the exit was not sure of (`confidence`; None: never). The token itself stays:
    dropping it for its probability would bias rejection sampling. With `pace`, each sequence's K follows what was
    accepted of its recent drafts.
    """

    def __init__(self, confidence: float | None, pace: bool, cost: float, drafts: int):
        """`cost` of one drafted token, in passes of the whole model; `drafts`: K."""
        self.confidence, self.pace, self.cost, self.drafts = confidence, pace, cost, drafts
        self._paces: dict[Request, Pace] = {}
        self._limits: list[int] = []

    def plan(self, requests: Sequence[Request]) -> int:
        """Sets each request's K for the round to come; returns the largest."""
        self._limits = [self.drafts] * len(requests)
        if self.pace:
            self._limits = [self._paces.setdefault(r, Pace(self.cost, self.drafts)).best() for r in requests]
        return max(self._limits)

    def begin(self, r: Round) -> None:
        torch.minimum(r.num_draft, r.num_draft.new_tensor(self._limits), out=r.num_draft)

    def stops(self, r: Round, t: int) -> bool:
        """After draft t: whether no sequence drafts another one, though the round has room for it."""
        if self.confidence is not None:
            doubtful = r.draft_head.confidence < self.confidence
            r.num_draft.copy_(torch.where(doubtful, r.num_draft.clamp(max=t + 1), r.num_draft))
        return t + 1 < r.drafts and not bool((r.num_draft > t + 1).any())

    def observe(self, request: Request, num_draft: int, num_accepted: int) -> None:
        if self.pace:
            self._paces[request].observe(num_draft, num_accepted)


class Pace:
    """The K that would decode one sequence fastest, if drafts are accepted as they were lately."""

    MEMORY = 0.9  # weight of a round against the one after it

    def __init__(self, cost: float, drafts: int):
        self.cost, self.drafts = cost, drafts
        self.reached, self.accepted = 1.0, drafts / (drafts + 1)  # at first as if all but one were accepted

    def observe(self, num_draft: int, num_accepted: int) -> None:
        self.reached = self.MEMORY * self.reached + min(num_accepted + 1, num_draft)
        self.accepted = self.MEMORY * self.accepted + num_accepted

    def best(self) -> int:
        """Arg-max over K >= 1 of expected tokens over cost (Leviathan et al., arXiv 2211.17192, theorem 3.8)."""
        rate = self.accepted / self.reached
        best, speed = 1, 0.0
        tokens, product = 1.0, 1.0
        for drafts in range(1, self.drafts + 1):
            product *= rate
            tokens += product
            if tokens / (1 + drafts * self.cost) > speed:
                best, speed = drafts, tokens / (1 + drafts * self.cost)
        return best
