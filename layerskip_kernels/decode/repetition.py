from __future__ import annotations

from collections.abc import Callable

import torch

from layerskip_kernels.decode.batch import NEVER, Batch
from layerskip_kernels.ops import RepetitionPenalty


class Repetition:
    """The repetition penalties of a round: of its drafts, and of the model's own tokens.

    The batch has for each sequence which tokens were seen, in its prompt and text. During a round the drafts are seen
    too, each from its window position on, so that every position is penalized as if the drafts before it were text.

    Attributes:
        drafts: `RepetitionPenalty` of the draft made at each window position, [B] rows.
        verify: of the whole window, [B * T] rows.
    """

    def __init__(self, batch: Batch, rows: int, window: int, vocab_size: int, matrix: Callable[..., torch.Tensor]):
        """`matrix(name, dtype)`: a [B, T] tensor."""
        self.first_seen = batch.first_seen[:rows]
        self.tokens, self.marks = matrix("seen_tokens", torch.int64), matrix("seen_marks", torch.uint8)
        self.factor, self.factors = batch.repetition_penalty[:rows], matrix("penalty_factors", torch.float32)
        seen = self.first_seen[:, :vocab_size]
        positions = torch.arange(window, dtype=torch.uint8, device=seen.device)[:, None].repeat(1, rows)
        self.drafts = [RepetitionPenalty(self.factor, seen, position) for position in positions]
        self.verify = RepetitionPenalty(self.factors.view(-1), seen, positions.T.flatten())

    def begin(self, pending: torch.Tensor) -> None:
        """Nothing is drafted; pending [B] is text."""
        self.tokens.copy_(pending[:, None])
        self.factors.copy_(self.factor[:, None])

    def add_draft(self, t: int, tokens: torch.Tensor) -> None:
        """tokens [B], the drafts at window position t, are seen from there on."""
        token, mark = self.tokens[:, t : t + 1], self.marks[:, t : t + 1]
        token.copy_(tokens[:, None])
        torch.gather(self.first_seen, 1, token, out=mark).clamp_(max=t)
        self.first_seen.scatter_(1, token, mark)

    def end(self, emitted: torch.Tensor) -> None:
        """emitted [B, T], padded with -1, are text; drafts are nothing."""
        torch.gather(self.first_seen, 1, self.tokens, out=self.marks).clamp_(max=1).mul_(NEVER)  # 0, text, stays
        self.first_seen.scatter_(1, self.tokens, self.marks)
        torch.remainder(emitted, self.first_seen.shape[1], out=self.tokens)  # -1 is the last column
        self.first_seen.scatter_(1, self.tokens, 0)
