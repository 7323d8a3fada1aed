from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address, optional
from layerskip_kernels.native.tensor import dtype_code


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
    if out is None:
        out = q.new_empty(q.shape)
    if not out.numel():
        return out
    sizes = (*q.shape[:3], k_cache.shape[1], q.shape[3], k_cache.shape[2])
    scratch = q.new_empty(_cuda.verify_attention_scratch(sizes), dtype=torch.uint8)
    launch.run(
        "verify_attention",
        _cuda.verify_attention,
        (q, k_cache),
        address(q, "q"),
        q.stride(),
        address(k_cache, "k_cache"),
        k_cache.stride(),
        address(v_cache, "v_cache"),
        v_cache.stride(),
        address(out, "out"),
        out.stride(),
        address(lengths, "lengths"),
        optional(slot_ids, "slot_ids"),
        optional(num_queries, "num_queries"),
        optional(tree_mask, "tree_mask"),
        0 if tree_mask is None else tree_mask.stride(0),
        sliding_window or 0,
        scale,
        sizes,
        dtype_code(q, "q"),
        address(scratch, "scratch"),
    )
    return out
