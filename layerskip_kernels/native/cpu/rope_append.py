from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.tensor import address, dtype_code


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    attention_factor: float = 1.0,
    slot_ids: Tensor | None = None,
    num_queries: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """See layerskip_kernels.ops.rope_append."""
    batch, window, heads, dim = q.shape
    _cpu.rope_append(
        address(q, "q", "cpu"),
        q.stride(),
        address(k, "k", "cpu"),
        k.stride(),
        address(v, "v", "cpu"),
        v.stride(),
        address(k_cache, "k_cache", "cpu"),
        k_cache.stride(),
        address(v_cache, "v_cache", "cpu"),
        v_cache.stride(),
        address(lengths, "lengths", "cpu"),
        address(positions, "positions", "cpu"),
        positions.stride(0),
        address(inv_freq, "inv_freq", "cpu"),
        inv_freq.stride()[:2] if inv_freq.dim() == 3 else (0, 0),
        attention_factor,
        0 if slot_ids is None else address(slot_ids, "slot_ids", "cpu"),
        0 if num_queries is None else address(num_queries, "num_queries", "cpu"),
        (batch, window, heads, k.shape[2], dim),
        dtype_code(q, "q"),
        torch.get_num_threads(),
    )
