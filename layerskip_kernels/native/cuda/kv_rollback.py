from __future__ import annotations

from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address, optional
from layerskip_kernels.native.tensor import dtype_code


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
    if path is not None and window > _cuda.ROLLBACK_MAX_WINDOW:
        raise ValueError(f"window={window}: with a path this backend takes 1..{_cuda.ROLLBACK_MAX_WINDOW}")
    layers, _, groups, _, dim = k_cache.shape
    launch.run(
        "kv_rollback",
        _cuda.kv_rollback,
        (k_cache, lengths),
        address(k_cache, "k_cache"),
        k_cache.stride(),
        address(v_cache, "v_cache"),
        v_cache.stride(),
        address(lengths, "lengths"),
        address(keep, "keep"),
        optional(slot_ids, "slot_ids"),
        optional(path, "path"),
        0 if path is None else path.stride(0),
        window,
        scrub,
        (layers, lengths.shape[0], groups, dim),
        dtype_code(k_cache, "k_cache"),
    )
