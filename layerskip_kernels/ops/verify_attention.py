from __future__ import annotations

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.registry import resolve


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    lengths: torch.Tensor,
    scale: float,
    slot_ids: torch.Tensor | None = None,
    num_queries: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    block_table: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each sequence's T-token window over its own ragged cache, the window's K/V included.

    Row t of sequence b sees storage positions ``[0, lengths[b])`` and the window rows ``u <= t`` at storage
    ``lengths[b] + u``, already written by `rope_append`. Query head h reads KV head ``h // (H / G)``. Softmax over
    ``scale · q·k`` in float32.

    Args:
        q: [B, T, H, D] float32, float16 or bfloat16, rotated.
        k_cache, v_cache: [slots, G, S, D], dtype of q. H is a multiple of G.
        lengths: [B] int32, valid positions before the window.
        scale: factor on q·k, > 0, usually ``D ** -0.5``.
        slot_ids: [B] int32; None: row i in slot i.
        num_queries: [B] int32, real rows of the window (0: an idle sequence, its KV is not read). None: all T. The
            other rows of the result are zero.
        tree_mask: [T, T] bool, True where window row t sees window row u, instead of ``u <= t``. Row t must see itself.
        sliding_window: row t sees only the last `sliding_window` storage positions up to its own,
            ``j > lengths + t - sliding_window``.
        block_table: reserved for paged caches.
        out: [B, T, H, D] to write the result to.

    Returns:
        [B, T, H, D] in the dtype of q, rounded once.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range. Contents of device tensors are the
        caller's promise.
    """
    _check.tensor("q", q, (None, None, None, None), dtype=_check.FLOATS)
    batch, window, heads, dim = q.shape
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"D={dim}: choose a multiple of 8 in 8..256")
    _check.caches(k_cache, v_cache, head_dim=dim, like=q)
    _check.tensor("k_cache", k_cache, dtype=q.dtype)
    if heads % k_cache.shape[1]:
        raise ValueError(f"H={heads}: must be a multiple of the cache's {k_cache.shape[1]} KV heads")
    _check.tensor("lengths", lengths, (batch,), dtype=torch.int32, like=q)
    _check.slots(slot_ids, batch, k_cache.shape[0], q)
    _check.optional("num_queries", num_queries, (batch,), dtype=torch.int32, like=q)
    _check.optional("tree_mask", tree_mask, (window, window), dtype=torch.bool, like=q)
    _check.positive("scale", scale)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: must be at least 1, or None")
    _check.no_paging(block_table)
    _check.optional("out", out, tuple(q.shape), dtype=q.dtype, like=q)
    if torch.compiler.is_compiling():
        result = torch.ops.layerskip_kernels.verify_attention(
            q, k_cache, v_cache, lengths, scale, slot_ids, num_queries, tree_mask, sliding_window
        )
        return _library.into(out, result)
    return resolve("verify_attention", q.device, q.dtype)(
        q,
        k_cache,
        v_cache,
        lengths=lengths,
        scale=scale,
        slot_ids=slot_ids,
        num_queries=num_queries,
        tree_mask=tree_mask,
        sliding_window=sliding_window,
        out=out,
    )


def _kernel(q, k_cache, v_cache, lengths, scale, slot_ids=None, num_queries=None, tree_mask=None, sliding_window=None):
    return verify_attention(
        q,
        k_cache,
        v_cache,
        lengths=lengths,
        scale=scale,
        slot_ids=slot_ids,
        num_queries=num_queries,
        tree_mask=tree_mask,
        sliding_window=sliding_window,
    )


_library.register(
    "verify_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale, Tensor? slot_ids=None, "
    "Tensor? num_queries=None, Tensor? tree_mask=None, int? sliding_window=None) -> Tensor",
    _kernel,
    lambda q, *args, **kwargs: q.new_empty(q.shape),
)
