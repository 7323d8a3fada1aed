from __future__ import annotations

from typing import NamedTuple

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.registry import resolve


class Verified(NamedTuple):
    """What a round emits. `num_emitted` is also how many window positions `kv_rollback` keeps."""

    tokens: torch.Tensor  # [B, K+1] int64: the emitted tokens, then -1
    num_emitted: torch.Tensor  # [B] int32
    num_accepted: torch.Tensor  # [B] int32: drafts among the emitted tokens
    finished: torch.Tensor  # [B] bool: finished before, or EOS emitted, or `remaining` used up


def verify_tokens(
    draft: torch.Tensor,
    target: torch.Tensor,
    num_draft: torch.Tensor,
    *,
    eos_ids: torch.Tensor,
    remaining: torch.Tensor,
    finished: torch.Tensor,
    out: Verified | None = None,
) -> Verified:
    """Accept the longest prefix of the draft that equals the target's own tokens, plus one target token.

    With ``a = max{n <= num_draft : draft[:n] == target[:n]}`` the tokens are ``target[: a + 1]``, cut after the first
    EOS and at `remaining` tokens (Leviathan et al., arXiv 2211.17192, for deterministic or coupled draws: the target's
    tokens are emitted, whatever the draft was). A finished sequence emits nothing.

    Args:
        draft: [B, K] int64, K >= 0.
        target: [B, K+1] int64, the target's token after each window row.
        num_draft: [B] int32, how many drafts of the row are real, 0..K.
        eos_ids: [any number] int64, tokens that end a sequence; may be empty.
        remaining: [B] int32, how many tokens the sequence may still emit.
        finished: [B] bool.
        out: `Verified` of tensors to write the result to; `out.finished` may be `finished`.

    Returns:
        `Verified`.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape or device.
    """
    _check.tensor("draft", draft, (None, None), dtype=torch.int64)
    batch, drafts = draft.shape
    _check.tensor("target", target, (batch, drafts + 1), dtype=torch.int64, like=draft)
    check_round(draft, num_draft, eos_ids, remaining, finished, out)
    if torch.compiler.is_compiling():
        result = torch.ops.layerskip_kernels.verify_tokens(draft, target, num_draft, eos_ids, remaining, finished)
        return Verified(*_library.into(out, result))
    return resolve("verify_tokens", draft.device, torch.int64)(
        draft, target, num_draft, eos_ids=eos_ids, remaining=remaining, finished=finished, out=out
    )


def check_round(draft, num_draft, eos_ids, remaining, finished, out) -> None:
    """The arguments that `verify_tokens` and `verify_rejection` share."""
    batch, drafts = draft.shape
    _check.tensor("num_draft", num_draft, (batch,), dtype=torch.int32, like=draft)
    _check.tensor("eos_ids", eos_ids, (None,), dtype=torch.int64, like=draft)
    _check.tensor("remaining", remaining, (batch,), dtype=torch.int32, like=draft)
    _check.tensor("finished", finished, (batch,), dtype=torch.bool, like=draft)
    if out is not None:
        if not isinstance(out, Verified):
            raise TypeError(f"out: expected a Verified, got {type(out).__name__}")
        _check.tensor("out.tokens", out.tokens, (batch, drafts + 1), dtype=torch.int64, like=draft)
        _check.tensor("out.num_emitted", out.num_emitted, (batch,), dtype=torch.int32, like=draft)
        _check.tensor("out.num_accepted", out.num_accepted, (batch,), dtype=torch.int32, like=draft)
        _check.tensor("out.finished", out.finished, (batch,), dtype=torch.bool, like=draft)


def fake_verified(draft):
    batch, drafts = draft.shape
    return (
        draft.new_empty(batch, drafts + 1),
        draft.new_empty(batch, dtype=torch.int32),
        draft.new_empty(batch, dtype=torch.int32),
        draft.new_empty(batch, dtype=torch.bool),
    )


_library.register(
    "verify_tokens(Tensor draft, Tensor target, Tensor num_draft, Tensor eos_ids, Tensor remaining, Tensor finished) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda draft, target, num_draft, eos_ids, remaining, finished: tuple(
        verify_tokens(draft, target, num_draft, eos_ids=eos_ids, remaining=remaining, finished=finished)
    ),
    lambda draft, *args, **kwargs: fake_verified(draft),
)
