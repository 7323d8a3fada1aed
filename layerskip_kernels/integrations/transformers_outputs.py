"""What transformers' `generate` returns: padded tensors, and its cache extended."""

from __future__ import annotations

from typing import Any

import torch

from layerskip_kernels.decode.batch import Request
from layerskip_kernels.decode.prefill import sampling_for
from layerskip_kernels.integrations.transformers_inputs import Inputs
from layerskip_kernels.ops import Sampling
from layerskip_kernels.reference.exit_head import process


def build_output(inputs: Inputs, pad: int | None, config: Any, wants_scores: bool, wants_logits: bool) -> Any:
    """int64 [B, P + new], or `GenerateDecoderOnlyOutput`; the cache, if one is to be seen, extended in place."""
    requests, prompts = inputs.requests, inputs.input_ids
    new = max(len(request.tokens) for request in requests)
    # without an end-of-sequence token all rows have `new` tokens, and `pad` may be None
    answers = [request.tokens + [pad] * (new - len(request.tokens)) for request in requests]
    sequences = torch.cat([prompts, prompts.new_tensor(answers)], dim=1)
    if inputs.cache is not None:
        _extend(inputs, inputs.length + new - 1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    logits = [_logits(request) for request in requests] if requests[0].logits else None
    scores = None
    if wants_scores:
        scores = [_scores(request, rows) for request, rows in zip(requests, logits or [None] * len(requests))]
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_per_step(scores, new, prompts.device) if wants_scores else None,
        logits=_per_step(logits, new, prompts.device) if wants_logits else None,
        past_key_values=inputs.cache,
    )


def _logits(request: Request) -> torch.Tensor:
    return torch.cat(request.logits)


def _scores(request: Request, logits: torch.Tensor | None) -> torch.Tensor:
    """[n, V]: kept while decoding where a processor ran, otherwise made from the logits as fused sampling does it."""
    if request.controls is not None:
        return request.controls.scores_of(request)
    if request.sampling is None:
        return logits
    one = sampling_for(request, logits.device)  # filters and temperature alone matter here
    return process(logits, Sampling(*(field.expand(len(logits)) for field in one)))


def _per_step(rows: list[torch.Tensor], new: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`new` tensors [B, V]; zeros where a sequence had ended."""
    stacked = rows[0].new_zeros(new, len(rows), rows[0].shape[1], device=device)
    for i, row in enumerate(rows):
        stacked[: len(row), i] = row
    return tuple(stacked)


def _extend(inputs: Inputs, length: int) -> None:
    """Append positions `past_length` to `length` to transformers' cache; those a row does not have are zeros."""
    k, v = inputs.requests[0].kv
    layers, heads, _, dim = k.shape
    for layer in range(layers):
        shape = (len(inputs.requests), heads, length - inputs.past_length, dim)
        new_k, new_v = k.new_zeros(shape), v.new_zeros(shape)
        for row, (request, pad) in enumerate(zip(inputs.requests, inputs.padding)):
            start = max(inputs.past_length, pad)
            for new, own in zip((new_k, new_v), request.kv):
                part = own[layer, :, start - pad :]
                new[row, :, start - inputs.past_length : start - inputs.past_length + part.shape[1]] = part
        inputs.cache.update(new_k, new_v, layer)
