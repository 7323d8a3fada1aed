from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from layerskip_kernels.decode.controls import Controls


NEVER = 255  # of `RepetitionPenalty.first_seen`


@dataclass
class SamplingOptions:
    """Sampling of one request; None in place of it means greedy."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    stream: int
    min_p: float = 0.0


@dataclass(eq=False)
class Request:
    """One prompt and what came of it."""

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingOptions | None = None
    repetition_penalty: float = 1.0
    penalized: list[int] | None = None  # tokens it holds for besides the request's own; None: the prompt's
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # [n, V] of the n tokens of each round, where asked for
    finish_reason: str | None = None
    slot: int = -1
    controls: Controls | None = None
    past: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # a layer's K and V of the prompt's first positions
    past_length: int = 0
    keep_kv: bool = False  # at the end, all layers' K and V [L, G, n, D] of all but the last token go to `kv`
    kv: tuple[torch.Tensor, torch.Tensor] | None = None

    def seen(self) -> list[int]:
        """The tokens that the repetition penalty holds for."""
        return (self.prompt if self.penalized is None else self.penalized) + self.tokens


class Batch:
    """Device state of the running sequences: row i of every tensor is sequence i, in cache slot `slot_ids[i]`.

    Rows of finished sequences are removed, so that an idle slot costs nothing; a row's results do not depend on its
    index.
    """

    def __init__(self, rows: int, device: torch.device, vocab_size: int):
        def make(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        self.requests: list[Request] = []
        self.slot_ids = make(torch.int32)
        self.lengths = make(torch.int32)  # positions valid in every layer the strategy runs
        self.pending = make(torch.int64)  # the last emitted token, which no layer has seen
        self.remaining = make(torch.int32)
        self.finished = make(torch.bool)
        self.temperature = make(torch.float32)
        self.top_k = make(torch.int64)
        self.top_p = make(torch.float32)
        self.min_p = make(torch.float32)
        self.seed = make(torch.int64)
        self.stream = make(torch.int64)
        self.repetition_penalty = make(torch.float32)
        self._tensors = [t for t in vars(self).values() if isinstance(t, torch.Tensor)]
        # [rows, more than V] uint8, 0: a token of prompt or text, NEVER: another; the last column is no token's. Kept
        # for rows with a penalty alone; see `Repetition`.
        self.first_seen = torch.full((rows, (vocab_size // 16 + 1) * 16), NEVER, dtype=torch.uint8, device=device)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request) -> None:
        """`request` has been prefilled: its prompt is in the cache, its first token is emitted."""
        row = len(self)
        self.requests.append(request)
        self.slot_ids[row] = request.slot
        self.lengths[row] = len(request.prompt)
        self.pending[row] = request.tokens[-1]
        self.remaining[row] = request.max_new_tokens - len(request.tokens)
        self.finished[row] = False
        self.repetition_penalty[row] = request.repetition_penalty
        if request.repetition_penalty != 1:
            self.first_seen[row] = NEVER
            self.first_seen[row, request.seen()] = 0
        if request.sampling is not None:
            for name, value in vars(request.sampling).items():
                getattr(self, name)[row] = value

    def drop_finished(self) -> list[Request]:
        """Remove the rows whose request has a finish reason; returns these requests."""
        dropped = [r for r in self.requests if r.finish_reason]
        if dropped:
            keep = [i for i, r in enumerate(self.requests) if not r.finish_reason]
            index = torch.tensor(keep, dtype=torch.int64, device=self.lengths.device)
            penalized = any(r.repetition_penalty != 1 for r in self.requests)
            for tensor in [*self._tensors, *([self.first_seen] if penalized else [])]:
                tensor[: len(keep)] = tensor[index]
            self.requests = [self.requests[i] for i in keep]
        return dropped
