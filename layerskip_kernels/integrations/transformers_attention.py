"""`attn_implementation="layerskip"`: our attention kernel inside transformers' own models."""

from __future__ import annotations

from typing import Any

import torch

from layerskip_kernels.models.config import MODEL_CLASSES
from layerskip_kernels.ops import verify_attention

NAME = "layerskip"
MAX_WINDOW = 64  # query tokens at a time; longer prompts are sdpa's


def register_attention() -> None:
    """Makes ``attn_implementation="layerskip"`` known to transformers; more calls change nothing.

    The kernel `verify_attention` then serves what it is made for: up to 64 new tokens on a dynamic cache, without
    padding. Everything else goes through transformers' sdpa: longer prompts, padded batches, static caches, dropout,
    and whatever needs gradients.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, T, D]; key, value [B, G, S, D], the last T positions being the queries' own. Returns [B, T, H, D].

    `attention_mask` None: causal, within `sliding_window`, no padding.
    """
    is_causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and dropout == 0 and not kwargs.get("softcap"):
        if _fits(query, key, value) and kwargs.get("position_bias") is None:
            return _kernel(query, key, value, scaling, sliding_window), None
        attention_mask = _causal_mask(query, key, sliding_window)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """None where `attention` knows without one: causal or sliding, ending at the cache's last position, no padding."""
    plain = allow_is_causal_skip and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    # elsewhere a local size may mean chunks, which the attention is not told about
    plain = plain and (local_size is None or getattr(config, "model_type", None) in MODEL_CLASSES)
    if plain and attention_mask is not None:
        plain = not torch.compiler.is_compiling() and bool(attention_mask.all())
    if plain:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,  # for sdpa None says other things of caches longer than their contents
        config=config,
        **kwargs,
    )


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    dim = query.shape[3]
    return (
        query.shape[2] <= MAX_WINDOW
        and dim % 8 == 0
        and 8 <= dim <= 256
        and value.shape == key.shape
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    )


def _kernel(query, key, value, scaling, sliding_window) -> torch.Tensor:
    batch, _, window, dim = query.shape
    lengths = torch.full((batch,), key.shape[2] - window, dtype=torch.int32, device=query.device)
    scale = dim**-0.5 if scaling is None else scaling
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (query.transpose(1, 2), key, value))
    return verify_attention(q, k, v, lengths=lengths, scale=scale, sliding_window=sliding_window)


def _causal_mask(query: torch.Tensor, key: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """What None stood for, said to sdpa; None where that is its own meaning of it."""
    window, length = query.shape[2], key.shape[2]
    if (window == length or window == 1) and (sliding_window is None or length <= sliding_window):
        return None
    distance = torch.arange(length - window, length, device=key.device)[:, None] - torch.arange(
        length, device=key.device
    )
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    return seen[None, None]
