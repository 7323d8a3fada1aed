"""One round of LayerSkip self-speculative decoding (arXiv 2404.16710, section 4), over static buffers.

Every sequence enters with `lengths` positions in the cache and one `pending` token that no layer has seen. It leaves
with up to K + 1 more tokens, the cache holding exactly the tokens before the new pending one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from layerskip_kernels.decode.adaptation import Adaptation
from layerskip_kernels.decode.buffers import Round
from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.model import Model
from layerskip_kernels.decode.rejection import Rejection
from layerskip_kernels.ops import Sampling


def self_speculative_round(
    model: Model,
    cache: KVCache,
    r: Round,
    exit_layer: int,
    eos_ids: torch.Tensor,
    show_draft: Callable[[Round], None] | None = None,
    control: Callable[[Round], None] | None = None,
    rejection: Rejection | None = None,
    adaptation: Adaptation | None = None,
) -> Round:
    """Draft with layers [0, exit_layer), verify with the rest, accept, roll back.

    `control` may replace the model's own tokens, and end sequences, before they are emitted. `rejection` draws and
    accepts in its own way. `adaptation` may stop the draft early; the round that is returned is then a narrower one.
    """
    begin(model, r)
    if rejection is not None:
        rejection.begin(r)
    if adaptation is not None:
        adaptation.begin(r)
    # rejection's text depends on what drafts, which the sequences beside it must not change
    copies = model.copies_draft(1 if rejection else len(r.pending))
    r = draft(model, cache, r, exit_layer, copies, rejection, adaptation)
    if show_draft is not None:
        show_draft(r)
    verify(model, cache, r, exit_layer, copies, None if rejection else r.verify_sampling)
    if control is not None:
        control(r)
    accept(model, r, eos_ids, rejection)
    roll_back(model, cache, r)
    return r


def plain_round(
    model: Model,
    cache: KVCache,
    r: Round,
    last_layer: int,
    eos_ids: torch.Tensor,
    control: Callable[[Round], None] | None = None,
) -> None:
    """One token by layers [0, last_layer): autoregressive decoding, or early exit. A round without drafts."""
    begin(model, r)
    step(model, cache, r, 0, last_layer)
    choose(model, r, r.verify_sampling)
    if control is not None:
        control(r)
    accept(model, r, eos_ids)
    roll_back(model, cache, r)


def begin(model: Model, r: Round) -> None:
    """The pending token opens the window; positions, and how many drafts each sequence has room for."""
    model.glue.begin_round(r)
    if model.rope.position_dependent:
        model.rope.rows(r.positions, out=r.inv_freq, index=r.rope_index)
    if r.repetition:
        r.repetition.begin(r.pending)


def draft(
    model: Model,
    cache: KVCache,
    r: Round,
    exit_layer: int,
    copies: bool,
    rejection: Rejection | None,
    adaptation: Adaptation | None,
) -> Round:
    """K tokens by the early layers, whose hidden states are kept; then their pass over the last draft.

    With `copies` of them nothing is kept, and verification starts over.
    """
    for t in range(r.drafts):
        step(model, cache, r, t, exit_layer, copies)
        if rejection is not None:
            r.tokens[:, t + 1] = rejection.draw(model, r, t)
        else:
            if r.sampled:
                r.draft_sampling.position.copy_(r.next_positions[:, t])
            penalty, head = r.repetition and r.repetition.drafts[t], r.draft_heads[t]
            model.draft_head(r.step_rows[t], r.draft_sampling, head, penalty=penalty)
            if head.token is not r.step_tokens[t + 1]:
                r.step_tokens[t + 1].copy_(head.token)
        if r.repetition:
            r.repetition.add_draft(t + 1, r.step_tokens[t + 1])
        if adaptation is not None and adaptation.stops(r, t):
            r = narrow(model, r, t + 1)
            break
    if not copies:
        step(model, cache, r, r.drafts, exit_layer)
    return r


def narrow(model: Model, r: Round, drafts: int) -> Round:
    """The same round with its first `drafts` drafts alone."""
    tokens, hidden = r.tokens[:, : drafts + 1].clone(), r.exit_hidden[:, :drafts].clone()
    num_draft = r.num_draft.clone()
    r = r.buffers.round(drafts)  # in the same storage
    begin(model, r)
    r.tokens.copy_(tokens)
    r.exit_hidden[:, :drafts] = hidden
    r.num_draft.copy_(num_draft)
    if r.repetition:
        for t in range(1, drafts + 1):
            r.repetition.add_draft(t, r.step_tokens[t])
    return r


def step(model: Model, cache: KVCache, r: Round, t: int, last_layer: int, copies: bool = False) -> None:
    """Layers [0, last_layer), or the copies of them that draft, on window position t."""
    model.embed(r.step_tokens[t], out=r.step_rows[t])
    model.run_layers(0, last_layer, r.step_hidden[t], cache, drafts=copies, **r.at[t])


def verify(model: Model, cache: KVCache, r: Round, exit_layer: int, copies: bool, sampling: Sampling | None) -> None:
    """The remaining layers on the whole window at once: the model's own token after each of its positions."""
    if copies:  # all layers then, over the K/V that these wrote
        model.embed(r.tokens.view(-1), out=r.exit_rows)
    model.run_layers(0 if copies else exit_layer, model.config.num_layers, r.exit_hidden, cache, **r.whole)
    choose(model, r, sampling)


def choose(model: Model, r: Round, sampling: Sampling | None) -> None:
    if r.logits is None:
        model.head(r.exit_rows, sampling, r.verify_head, penalty=r.repetition and r.repetition.verify)
    else:  # raw ones; `control` or `rejection` penalizes
        model.head(r.exit_rows, sampling, r.verify_head, r.logits.flatten(0, 1))


def accept(model: Model, r: Round, eos_ids: torch.Tensor, rejection: Rejection | None = None) -> None:
    """Emit the drafts that equal the model's tokens, and one token more; the last one becomes pending."""
    ends = dict(eos_ids=eos_ids, remaining=r.remaining, finished=r.finished, out=r.verified)
    if rejection is None:
        model.ops.verify_tokens(r.tokens[:, 1:], r.target, r.num_draft, **ends)
    else:
        rejection.accept(model, r, **ends)
    if r.repetition:
        r.repetition.end(r.verified.tokens)
    model.glue.end_round(r)


def roll_back(model: Model, cache: KVCache, r: Round) -> None:
    """Keep the window positions before the new pending token, in every layer."""
    model.ops.kv_rollback(cache.k, cache.v, r.lengths, r.verified.num_emitted, slot_ids=r.slot_ids, window=r.window)
