from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.tensor import address, dtype_code


def kv_rollback(
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    keep: Tensor,
    *,
    slot_ids: Tensor | None = None,
    path: Tensor | None = None,
    window: int,
    scrub: bool = False,
    block_table: Tensor | None = None,
) -> None:
    """See layerskip_kernels.ops.kv_rollback."""
    layers, _, groups, _, dim = k_cache.shape
    _cpu.kv_rollback(
        address(k_cache, "k_cache", "cpu"),
        k_cache.stride(),
        address(v_cache, "v_cache", "cpu"),
        v_cache.stride(),
        address(lengths, "lengths", "cpu"),
        address(keep, "keep", "cpu"),
        0 if slot_ids is None else address(slot_ids, "slot_ids", "cpu"),
        0 if path is None else address(path, "path", "cpu"),
        0 if path is None else path.stride(0),
        window,
        scrub,
        (layers, lengths.shape[0], groups, dim),
        dtype_code(k_cache, "k_cache"),
        torch.get_num_threads(),
    )
