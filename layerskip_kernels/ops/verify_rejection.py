from __future__ import annotations

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.ops.verify_tokens import Verified, check_round, fake_verified
from layerskip_kernels.registry import resolve

METHODS = ("standard", "block")


def verify_rejection(
    draft: torch.Tensor,
    draft_probs: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    num_draft: torch.Tensor,
    *,
    method: str = "standard",
    eos_ids: torch.Tensor,
    remaining: torch.Tensor,
    finished: torch.Tensor,
    out: Verified | None = None,
) -> Verified:
    """Lossless speculative sampling by rejection: the emitted tokens are distributed as the target's.

    With q, p the draft's and target's probabilities and n = num_draft:

    - ``"standard"`` (Leviathan et al., arXiv 2211.17192, algorithm 1): draft i is accepted when
      ``uniforms[i, 0] · q_i(x_i) < p_i(x_i)``, until the first rejection at a; the next token comes from
      ``max(p_a - q_a, 0)`` normalised, or from p_n after n acceptances.
    - ``"block"`` (Sun et al., arXiv 2403.10444, algorithm 2): with ``r_0 = 1`` and
      ``r_i = min(r_{i-1} · p_i(x_i) / q_i(x_i), 1)`` the accepted length is the largest i with
      ``uniforms[i-1, 0] < h_i``, where ``h_n = r_n``, ``h_i = s_i / (s_i + 1 - r_i)`` and
      ``s_i = Σ_x max(r_i p_{i+1}(x) - q_{i+1}(x), 0)``; the next token comes from ``max(r_a p_{a+1} - q_{a+1}, 0)``
      normalised. Never accepts fewer tokens on average than "standard".

    The next token is the first index whose cumulative weight exceeds ``uniforms[a, 1] ·`` the total (float64 sums). A
    residual that is empty (rounding) falls back to p. Then the cuts of `verify_tokens`.

    Args:
        draft: [B, K] int64.
        draft_probs: [B, K, V] float32, the distribution each draft was really drawn from.
        target_probs: [B, K+1, V] float32.
        uniforms: [B, K+1, 2] float32 in [0, 1): acceptance, and draw of the next token.
        num_draft, eos_ids, remaining, finished, out: as in `verify_tokens`.
        method: "standard" or "block".

    Returns:
        `Verified`.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or value.
    """
    _check.tensor("draft", draft, (None, None), dtype=torch.int64)
    batch, drafts = draft.shape
    _check.tensor("target_probs", target_probs, (batch, drafts + 1, None), dtype=torch.float32, like=draft)
    vocab = target_probs.shape[2]
    _check.tensor("draft_probs", draft_probs, (batch, drafts, vocab), dtype=torch.float32, like=draft)
    _check.tensor("uniforms", uniforms, (batch, drafts + 1, 2), dtype=torch.float32, like=draft)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose {' or '.join(METHODS)}")
    check_round(draft, num_draft, eos_ids, remaining, finished, out)
    if torch.compiler.is_compiling():
        result = torch.ops.layerskip_kernels.verify_rejection(
            draft, draft_probs, target_probs, uniforms, num_draft, method, eos_ids, remaining, finished
        )
        return Verified(*_library.into(out, result))
    return resolve("verify_rejection", draft.device, torch.float32)(
        draft,
        draft_probs,
        target_probs,
        uniforms,
        num_draft,
        method=method,
        eos_ids=eos_ids,
        remaining=remaining,
        finished=finished,
        out=out,
    )


def _kernel(draft, draft_probs, target_probs, uniforms, num_draft, method, eos_ids, remaining, finished):
    return tuple(
        verify_rejection(
            draft,
            draft_probs,
            target_probs,
            uniforms,
            num_draft,
            method=method,
            eos_ids=eos_ids,
            remaining=remaining,
            finished=finished,
        )
    )


_library.register(
    "verify_rejection(Tensor draft, Tensor draft_probs, Tensor target_probs, Tensor uniforms, Tensor num_draft, "
    "str method, Tensor eos_ids, Tensor remaining, Tensor finished) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    lambda draft, *args, **kwargs: fake_verified(draft),
)
