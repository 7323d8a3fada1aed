from __future__ import annotations

import torch

from layerskip_kernels.decode.batch import NEVER, Request
from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.model import Model
from layerskip_kernels.ops import ExitHead, RepetitionPenalty, Sampling

SHORT_PROMPT = 32  # below it the products are `small_linear`'s, whose bits do not depend on the thread count
CHUNK = 512  # fixed, so that a prompt is always cut in the same places


def prefill(
    model: Model, cache: KVCache, request: Request, last_layer: int, deterministic: bool, logits: torch.Tensor | None
) -> tuple[int, float]:
    """Layers [0, last_layer) over one prompt into its slot, from `past_length` on; the head on its last position only.

    Returns the first new token and its log-probability. `logits` [1, V] float32 receives what it was chosen from,
    which is without a penalty then.
    """
    device = cache.k.device
    prompt = torch.tensor(request.prompt, dtype=torch.int64, device=device)
    slot_ids = torch.tensor([request.slot], dtype=torch.int32, device=device)
    if request.past is not None:
        cache.load(request.slot, request.past, request.past_length)
    many = len(prompt) - request.past_length >= SHORT_PROMPT and not deterministic
    for start in range(request.past_length, len(prompt), CHUNK):
        ids = prompt[start : start + CHUNK]
        hidden = model.weights.embedding[ids][None]
        positions = torch.arange(start, start + len(ids), dtype=torch.int32, device=device)[None]
        model.run_layers(
            0,
            last_layer,
            hidden,
            cache,
            prefill=many,
            lengths=positions[:, 0].clone(),
            positions=positions,
            inv_freq=model.rope.prefill(len(prompt)),
            slot_ids=slot_ids,
        )
    head = ExitHead(
        torch.empty(1, dtype=torch.int64, device=device),
        torch.empty(1, dtype=torch.float32, device=device),
        torch.empty(1, dtype=torch.float32, device=device),
    )
    penalty = penalty_for(request, model.config.vocab_size, device) if logits is None else None
    model.head(hidden[:, -1], sampling_for(request, device), head, logits, penalty)
    return head.token.item(), head.logprob.item()


def penalty_for(request: Request, vocab_size: int, device: torch.device) -> RepetitionPenalty | None:
    """Penalty of the request's first token."""
    if request.repetition_penalty == 1:
        return None
    first_seen = torch.full((1, vocab_size), NEVER, dtype=torch.uint8, device=device)
    first_seen[0, request.seen()] = 0
    position = torch.zeros(1, dtype=torch.uint8, device=device)
    factor = torch.full((1,), request.repetition_penalty, dtype=torch.float32, device=device)
    return RepetitionPenalty(factor, first_seen, position)


def sampling_for(request: Request, device: torch.device) -> Sampling | None:
    """Sampling of the request's first token, at position P."""
    if request.sampling is None:
        return None
    options = request.sampling

    def row(value, dtype):
        return torch.tensor([value], dtype=dtype, device=device)

    return Sampling(
        temperature=row(options.temperature, torch.float32),
        seed=row(options.seed, torch.int64),
        position=row(len(request.prompt), torch.int64),
        stream=row(options.stream, torch.int64),
        top_k=row(options.top_k, torch.int64),
        top_p=row(options.top_p, torch.float32),
        min_p=row(options.min_p, torch.float32),
    )
