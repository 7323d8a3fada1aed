from __future__ import annotations

from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address, optional
from layerskip_kernels.native.tensor import dtype_code


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
    launch.run(
        "rope_append",
        _cuda.rope_append,
        (q, k, k_cache),
        address(q, "q"),
        q.stride(),
        address(k, "k"),
        k.stride(),
        address(v, "v"),
        v.stride(),
        address(k_cache, "k_cache"),
        k_cache.stride(),
        address(v_cache, "v_cache"),
        v_cache.stride(),
        address(lengths, "lengths"),
        address(positions, "positions"),
        positions.stride(0),
        address(inv_freq, "inv_freq"),
        inv_freq.stride()[:2] if inv_freq.dim() == 3 else (0, 0),
        attention_factor,
        optional(slot_ids, "slot_ids"),
        optional(num_queries, "num_queries"),
        (batch, window, heads, k.shape[2], dim),
        dtype_code(q, "q"),
    )
