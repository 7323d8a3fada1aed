from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.tensor import address, dtype_code


def verify_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    lengths: Tensor,
    scale: float,
    slot_ids: Tensor | None = None,
    num_queries: Tensor | None = None,
    tree_mask: Tensor | None = None,
    sliding_window: int | None = None,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See layerskip_kernels.ops.verify_attention."""
    batch, window, heads, dim = q.shape
    if out is None:
        out = q.new_empty(batch, window, heads, dim)
    _cpu.verify_attention(
        address(q, "q", "cpu"),
        q.stride(),
        address(k_cache, "k_cache", "cpu"),
        k_cache.stride(),
        address(v_cache, "v_cache", "cpu"),
        v_cache.stride(),
        address(out, "out", "cpu"),
        out.stride(),
        address(lengths, "lengths", "cpu"),
        0 if slot_ids is None else address(slot_ids, "slot_ids", "cpu"),
        0 if num_queries is None else address(num_queries, "num_queries", "cpu"),
        0 if tree_mask is None else address(tree_mask, "tree_mask", "cpu"),
        0 if tree_mask is None else tree_mask.stride(0),
        sliding_window or 0,
        scale,
        (batch, window, heads, k_cache.shape[1], dim),
        dtype_code(q, "q"),
        torch.get_num_threads(),
    )
    return out
