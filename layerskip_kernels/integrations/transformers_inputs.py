"""What transformers' `generate` prepared, as requests for the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from layerskip_kernels.decode.batch import Request

_MODES = ("greedy_search", "sample", "assisted_generation")
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


class Unsupported(ValueError):
    """Asked for something that only transformers' own `generate` does."""


@dataclass
class Inputs:
    """One call: its requests, and how they lie in transformers' padded tensors."""

    input_ids: torch.Tensor  # [B, P] as given
    requests: list[Request]
    padding: list[int]  # of each row, on the left
    length: int  # padded length of the prompts, what `cache` holds included
    cache: Any  # transformers' cache to extend, or None
    past_length: int  # what it held, padding included


def check_supported(config: Any, model_kwargs: dict, streamer: Any, input_ids: torch.Tensor) -> None:
    """Raises Unsupported, before anything has happened."""
    if config.num_beams is not None and config.num_beams > 1:
        raise Unsupported(f"num_beams={config.num_beams}: beam search is not supported, choose 1")
    if (mode := config.get_generation_mode().value) not in _MODES:
        raise Unsupported(f"generation mode {mode} is not supported, only greedy search and sampling are")
    if model_kwargs.get("inputs_embeds") is not None:
        raise Unsupported("inputs_embeds: not supported, give input_ids")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise Unsupported(f"{name}=True: not supported, self-speculative decoding does not keep them")
    for name, value in model_kwargs.items():
        if name not in _KNOWN and value is not None:
            raise Unsupported(f"{name}: not supported by layerskip_kernels")
    if streamer is not None and len(input_ids) != 1:
        raise Unsupported(f"streamer: works for one sequence, got {len(input_ids)}")


def read_inputs(
    model: Any, input_ids: torch.Tensor, config: Any, max_length: int, strategy: str, model_kwargs: dict
) -> Inputs:
    """Requests of the rows of `input_ids` [B, P].

    Where `past_key_values` holds positions already, `input_ids` are all of the sequence or only what is new: the mask
    tells, as in transformers.
    """
    rows, width = input_ids.shape
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    past_length = 0 if cache is None else int(cache.get_seq_length())
    length = mask.shape[1] if mask is not None else getattr(config, "_mask_length", width)
    if length < width:
        raise ValueError(f"attention_mask: {length} columns, input_ids has {width}")
    if length > width and length - width != past_length:
        raise ValueError(
            f"attention_mask: {length} columns, expected {width} of input_ids, or {past_length + width} with the "
            f"{past_length} positions of past_key_values"
        )
    if past_length >= length:
        raise ValueError(f"past_key_values: holds {past_length} of {length} positions, at least one must be new")
    padding = _padding(mask, rows, length)
    _check_positions(model_kwargs.get("position_ids"), padding, rows, length)
    if max_length <= width:
        raise ValueError(f"max_length={max_length}: the prompts have {width} tokens, choose more")
    shown = input_ids.tolist()
    unknown = [0] * (length - width)  # their K and V are there
    vocab = model.config.vocab_size
    requests = []
    for row, (ids, pad) in enumerate(zip(shown, padding)):
        request = Request((unknown + ids)[pad:], max_length - width, past_length=max(past_length - pad, 0))
        if not all(0 <= token < vocab for token in request.prompt):
            raise ValueError(f"input_ids: row {row} has a token outside the vocabulary, 0..{vocab - 1}")
        if past_length:
            request.past = _past_of_row(cache, row, rows, request.past_length, model)
        requests.append(request)
    if strategy == "early_exit" or not (config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)):
        cache = None  # nobody will see it
    for request in requests:
        request.keep_kv = cache is not None
    return Inputs(input_ids, requests, padding, length, cache, past_length)


def _padding(mask: torch.Tensor | None, rows: int, length: int) -> list[int]:
    if mask is None:
        return [0] * rows
    padding = (mask == 0).sum(1).tolist()
    for row, pad in enumerate(padding):
        if not (mask[row, pad:] != 0).all():
            raise Unsupported(
                f"attention_mask: row {row} has a zero after a one; only padding on the left is supported "
                "(without a mask transformers makes one, with zeros at every pad_token_id)"
            )
        if pad == length:
            raise ValueError(f"attention_mask: row {row} masks everything")
    return padding


def _check_positions(positions: torch.Tensor | None, padding: list[int], rows: int, length: int) -> None:
    if positions is None:
        return
    for row, pad in enumerate(padding):
        given = positions[row if positions.shape[0] == rows else 0, pad - length :].tolist()
        if given != list(range(length - pad))[-len(given) :]:
            raise Unsupported(f"position_ids: row {row} does not count from 0, which is not supported; leave them out")


def _past_of_row(cache: Any, row: int, rows: int, length: int, model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    past = []
    for index in range(model.config.num_hidden_layers):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise Unsupported(
                f"past_key_values: a {type(cache).__name__} with contents can't be continued, use a DynamicCache"
            )
        if layer.keys.shape[0] != rows:
            raise ValueError(f"past_key_values: has {layer.keys.shape[0]} sequences, input_ids {rows}")
        kept = min(length, layer.keys.shape[2])
        if layer.keys.dtype != model.dtype:
            raise ValueError(f"past_key_values: {layer.keys.dtype}, the model is {model.dtype}")
        first = layer.keys.shape[2] - kept
        past.append((layer.keys[row, :, first:], layer.values[row, :, first:]))
    return past
