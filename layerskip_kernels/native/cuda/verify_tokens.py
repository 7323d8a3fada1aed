from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address
from layerskip_kernels.ops.verify_tokens import Verified


def verify_tokens(
    draft: Tensor,
    target: Tensor,
    num_draft: Tensor,
    *,
    eos_ids: Tensor,
    remaining: Tensor,
    finished: Tensor,
    out: Verified | None = None,
) -> Verified:
    """See layerskip_kernels.ops.verify_tokens."""
    fields, out = round_fields(draft, num_draft, eos_ids, remaining, finished, out)
    launch.run(
        "verify_tokens", _cuda.verify_tokens, (draft, target), fields, address(target, "target"), target.stride(0)
    )
    return out


def round_fields(draft, num_draft, eos_ids, remaining, finished, out) -> tuple[tuple[int, ...], Verified]:
    """The library's VerifyRound, and the outputs."""
    batch, drafts = draft.shape
    if out is None:
        out = Verified(
            draft.new_empty(batch, drafts + 1),
            torch.empty_like(num_draft),
            torch.empty_like(num_draft),
            torch.empty_like(finished),
        )
    fields = (
        address(draft, "draft"),
        draft.stride(0),
        address(num_draft, "num_draft"),
        batch,
        drafts,
        address(eos_ids, "eos_ids"),
        eos_ids.shape[0],
        address(remaining, "remaining"),
        address(finished, "finished"),
        address(out.tokens, "out.tokens"),
        out.tokens.stride(0),
        address(out.num_emitted, "out.num_emitted"),
        address(out.num_accepted, "out.num_accepted"),
        address(out.finished, "out.finished"),
    )
    return fields, out
