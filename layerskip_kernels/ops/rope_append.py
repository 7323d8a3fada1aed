from __future__ import annotations

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.registry import resolve


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_factor: float = 1.0,
    slot_ids: torch.Tensor | None = None,
    num_queries: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> None:
    """Rotate q in place and append the window's rotated k, and v, to the cache (RoPE: Su et al., arXiv 2104.09864).

    Row t of sequence b is rotated by the angles ``positions[b, t] · inv_freq``, pairing element i with i + D/2, and its
    k and v go to storage index ``lengths[b] + t`` of the sequence's slot. `lengths` is read, never changed: only
    `kv_rollback` does that.

    Args:
        q: [B, T, H, D] float32, float16 or bfloat16, rotated in place.
        k, v: [B, T, G, D], dtype of q.
        k_cache, v_cache: [slots, G, S, D], dtype of q.
        lengths: [B] int32, valid positions before the window.
        positions: [B, T] int32, what to rotate by (differs from lengths + t in a token tree).
        inv_freq: [D/2] float32, or [B, T, D/2] where the frequencies depend on the position (dynamic NTK, longrope).
        attention_factor: cos and sin are multiplied by it, > 0 (YaRN, longrope).
        slot_ids: [B] int32, the cache slot of each row; None: row i in slot i. Each slot at most once.
        num_queries: [B] int32, rows of the window that are real; the others are neither rotated nor written.
            None: all T.
        block_table: reserved for paged caches.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range. Contents of device tensors
        (lengths + T > S, slot ids out of range) are the caller's promise.
    """
    _check.tensor("q", q, (None, None, None, None), dtype=_check.FLOATS)
    batch, window, _, dim = q.shape
    _check.between("D", dim, 8, 256)
    if dim % 8:
        raise ValueError(f"D={dim}: choose a multiple of 8 in 8..256")
    _check.tensor("k", k, (batch, window, None, dim), dtype=q.dtype, like=q)
    _check.tensor("v", v, tuple(k.shape), dtype=q.dtype, like=q)
    _check.caches(k_cache, v_cache, groups=k.shape[2], head_dim=dim, like=q)
    _check.tensor("k_cache", k_cache, dtype=q.dtype)
    _check.tensor("lengths", lengths, (batch,), dtype=torch.int32, like=q)
    _check.tensor("positions", positions, (batch, window), dtype=torch.int32, like=q)
    per_row = isinstance(inv_freq, torch.Tensor) and inv_freq.dim() == 3
    _check.tensor(
        "inv_freq", inv_freq, (batch, window, dim // 2) if per_row else (dim // 2,), dtype=torch.float32, like=q
    )
    _check.positive("attention_factor", attention_factor)
    _check.slots(slot_ids, batch, k_cache.shape[0], q)
    _check.optional("num_queries", num_queries, (batch,), dtype=torch.int32, like=q)
    _check.no_paging(block_table)
    if torch.compiler.is_compiling():
        torch.ops.layerskip_kernels.rope_append(
            q, k, v, k_cache, v_cache, lengths, positions, inv_freq, attention_factor, slot_ids, num_queries
        )
        return
    resolve("rope_append", q.device, q.dtype)(
        q,
        k,
        v,
        k_cache,
        v_cache,
        lengths=lengths,
        positions=positions,
        inv_freq=inv_freq,
        attention_factor=attention_factor,
        slot_ids=slot_ids,
        num_queries=num_queries,
    )


def _kernel(q, k, v, k_cache, v_cache, lengths, positions, inv_freq, attention_factor, slot_ids, num_queries):
    rope_append(
        q,
        k,
        v,
        k_cache,
        v_cache,
        lengths=lengths,
        positions=positions,
        inv_freq=inv_freq,
        attention_factor=attention_factor,
        slot_ids=slot_ids,
        num_queries=num_queries,
    )


_library.register(
    "rope_append(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor lengths, "
    "Tensor positions, Tensor inv_freq, float attention_factor, Tensor? slot_ids, Tensor? num_queries) -> ()",
    _kernel,
    lambda *args, **kwargs: None,
)
