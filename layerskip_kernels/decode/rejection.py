"""Speculative sampling by rejection, in place of the noise that draft and model share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerskip_kernels.decode.arguments import one_of
from layerskip_kernels.decode.batch import Request
from layerskip_kernels.decode.buffers import Round
from layerskip_kernels.decode.model import Model
from layerskip_kernels.ops import Sampling
from layerskip_kernels.ops.verify_rejection import METHODS
from layerskip_kernels.reference.exit_head import lowest_argmax, penalize, process
from layerskip_kernels.reference.gumbel import random_words

VERIFICATIONS = ("coupled", "rejection")
OWN_WORDS = 1 << 31  # as an index of `random_words`: above those of any vocabulary's Gumbel noise


class Rejection:
    """Drafts and accepts the tokens of a round by `ops.verify_rejection`, on the distributions after all filters.

    A draft's is that of the head that drew it, which may be a quantized copy of the model's.

    The random words of a round are those of its window's rows and the position it starts at. Every round starts further
    on, so none draws with words that another one has looked at; with the drafted position alone it would, and block
    verification decides about a draft by the words of the next ones.
    """

    def __init__(self, method: str, requests: Sequence[Request]):
        self.method = method
        options = [request.sampling for request in requests]
        self._off = {
            "top_k": all(o.top_k == 0 for o in options),
            "top_p": all(o.top_p == 1 for o in options),
            "min_p": all(o.min_p == 0 for o in options),
        }

    def begin(self, r: Round) -> None:
        rows, window, vocab = r.logits.shape
        self.draft_uniforms, self.uniforms = uniforms(r.draft_sampling, r.lengths, window)
        self.draft_probs = r.logits.new_empty(rows, window - 1, vocab)

    def draw(self, model: Model, r: Round, t: int) -> torch.Tensor:
        """Draft t of each row, [B] int64."""
        logits = self.draft_probs[:, t]
        model.draft_head(
            r.exit_hidden[:, t], None, r.draft_head, logits, penalty=r.repetition and r.repetition.drafts[t]
        )
        logits.copy_(self._probabilities(logits, r.draft_sampling))
        return draw(logits, self.draft_uniforms[:, t])

    def accept(self, model: Model, r: Round, **ends: Any) -> None:
        logits = r.logits.flatten(0, 1)
        if r.repetition:
            logits = penalize(logits, r.repetition.verify)
        target_probs = self._probabilities(logits, r.verify_sampling).view_as(r.logits)
        model.ops.verify_rejection(
            r.tokens[:, 1:],
            self.draft_probs[:, : r.drafts],  # which the round may have got fewer of
            target_probs,
            self.uniforms[:, : r.window],
            r.num_draft,
            method=self.method,
            **ends,
        )

    def _probabilities(self, logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        return probabilities(logits, sampling._replace(**{name: None for name, off in self._off.items() if off}))


def rejection_of(
    verification: str, method: str | None, requests: Sequence[Request], sample: bool, strategy: str, processed: bool
) -> Rejection | None:
    """What `generate` was asked for; None for coupled noise."""
    one_of("verification", verification, VERIFICATIONS)
    if method is not None:
        one_of("rejection_method", method, METHODS)
    if verification == "coupled":
        if method is not None:
            raise ValueError(f"rejection_method={method!r}: is of verification='rejection', which was not chosen")
        return None
    if not (sample and isinstance(strategy, str) and strategy == "self_speculative"):
        raise ValueError(
            "verification='rejection': decides about sampled drafts, so it needs sample=True and "
            "generation_strategy='self_speculative'"
        )
    if processed:
        raise ValueError(
            "verification='rejection': works without logits_processor, stopping_criteria and min_new_tokens, and "
            "without output_logits where there is a repetition_penalty; choose verification='coupled'"
        )
    return Rejection(method or "standard", requests)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[N, V] float32: the distribution that `exit_head` draws from with this sampling; logits [N, V] float32."""
    probs = process(logits, sampling).softmax(-1)
    chosen = torch.zeros_like(probs).scatter_(1, lowest_argmax(logits)[:, None].clamp(max=probs.shape[1] - 1), 1)
    return torch.where(sampling.temperature[:, None] == 0, chosen, probs)


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First index whose cumulative probability exceeds ``uniform · total``; probs [N, V], uniform [N] float64."""
    cumulative = probs.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last of positive probability
    return torch.minimum(index, last)[:, 0].clamp(max=probs.shape[1] - 1)  # of NaN any index does


def uniforms(sampling: Sampling, start: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform numbers in [0, 1) of rounds that start at positions `start` [B] int32, for rows of (seed, stream).

    Returns:
        [B, T] float64, to draw drafts with; [B, T, 2] float32, of `ops.verify_rejection`.
    """
    index = OWN_WORDS + torch.arange(window, device=start.device)
    words = random_words(sampling.seed, sampling.stream, start.long(), index)
    fine = (words[0] << 21 | words[3] >> 11).double() * 2.0**-53
    return fine, (torch.stack(words[1:3], dim=-1) >> 8).float() * 2.0**-24
