"""What a round of decoding does between its ops, by torch. `native.cuda.glue` has the same in a kernel each.

A module of this kind has these three functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from layerskip_kernels.decode.buffers import Round


def embed(table: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """Rows `tokens` [N] int64 of table [V, C] -> out [N, C]."""
    torch.index_select(table, 0, tokens, out=out)


def begin_round(r: Round) -> None:
    """The pending token opens the window; positions, drafts that each sequence has room for, settings per position."""
    r.step_tokens[0].copy_(r.pending)
    torch.add(r.lengths[:, None], r.offsets, out=r.positions)
    torch.add(r.offsets[:, None], r.lengths, out=r.step_lengths)
    torch.sub(r.remaining, 1, out=r.num_draft).clamp_(0, r.drafts)
    if r.sampled:
        torch.add(r.positions, 1, out=r.next_positions)
        for per_request, repeated in r.repeated:
            repeated.copy_(per_request[:, None])


def end_round(r: Round) -> None:
    """What was emitted is no longer remaining; its last token becomes pending."""
    r.remaining.sub_(r.verified.num_emitted)
    # Of a sequence that had ended, which the host may not have seen yet, any token does.
    torch.sub(r.verified.num_emitted, 1, out=r.last).clamp_(min=0)
    torch.gather(r.verified.tokens, 1, r.last[:, None], out=r.pending[:, None]).clamp_(min=0)
