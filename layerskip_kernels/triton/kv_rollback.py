"""Move the accepted branch's K/V to the front of the window and zero the rest, in every layer, in one launch.

A program owns some columns of one (layer, sequence, KV head) for all of the window: it reads every row before it writes
the first, and no two programs share an element, so overlapping moves are right in any order of blocks. A chain without
scrub moves nothing: `lengths += keep` is all there is.

Bound by bytes: 2 caches · L · B · G · D · (read kept + written rows) · itemsize. Expected on an H100 (3.35 TB/s), not
measured: L = 32, B = 1, G = 8, D = 128, bfloat16, 5 of 16 rows kept: 0.65 MB, so the launch (about 2 µs) decides;
B = 64, scrubbing as well: 88 MB, 26 µs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerskip_kernels.triton.launch import aligned, check, follow_previous_kernels, guard, round_options, row_offset

_VARYING = ["groups", "stride_path"] + [f"stride_{c}{n}" for c in "kv" for n in ("l", "slot", "g", "s")]


@triton.jit(do_not_specialize=_VARYING)
def kv_rollback_kernel(
    k_ptr,
    v_ptr,
    lengths_ptr,
    keep_ptr,
    slot_ids_ptr,
    path_ptr,
    groups,
    stride_path,
    stride_kl,
    stride_kslot,
    stride_kg,
    stride_ks,
    stride_vl,
    stride_vslot,
    stride_vg,
    stride_vs,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    SCRUB: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_WINDOW: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow_previous_kernels(OVERLAP)
    layer = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    b = tl.program_id(1)
    slot = b
    if slot_ids_ptr is not None:
        slot = tl.load(slot_ids_ptr + b)
    start = tl.load(lengths_ptr + b)
    keep = tl.load(keep_ptr + b)

    row = tl.arange(0, BLOCK_WINDOW)
    kept = row < keep
    source = row
    if path_ptr is not None:
        source = tl.load(path_ptr + row_offset(b, stride_path, False) + row, mask=kept & (row < WINDOW), other=0)
    column = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = (row < WINDOW)[:, None] & (column < DIM)[None, :]
    moved = inside & kept[:, None]
    dropped = inside & (row >= keep)[:, None]

    k_ptr += row_offset(layer, stride_kl, ALIGNED) + row_offset(slot, stride_kslot, ALIGNED)
    k_ptr += row_offset(group, stride_kg, ALIGNED)
    v_ptr += row_offset(layer, stride_vl, ALIGNED) + row_offset(slot, stride_vslot, ALIGNED)
    v_ptr += row_offset(group, stride_vg, ALIGNED)
    k_target = k_ptr + row_offset(start + row, stride_ks, ALIGNED)[:, None] + column[None, :]
    v_target = v_ptr + row_offset(start + row, stride_vs, ALIGNED)[:, None] + column[None, :]
    if path_ptr is not None:
        k_source = k_ptr + row_offset(start + source, stride_ks, ALIGNED)[:, None] + column[None, :]
        v_source = v_ptr + row_offset(start + source, stride_vs, ALIGNED)[:, None] + column[None, :]
        k = tl.load(k_source, mask=moved, other=0.0)
        v = tl.load(v_source, mask=moved, other=0.0)
        tl.debug_barrier()  # every thread of the program has read
        tl.store(k_target, k, mask=moved)
        tl.store(v_target, v, mask=moved)
    if SCRUB:
        zero = tl.zeros([BLOCK_WINDOW, BLOCK_DIM], k_ptr.dtype.element_ty)
        tl.store(k_target, zero, mask=dropped)
        tl.store(v_target, zero, mask=dropped)


def kv_rollback(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    keep: torch.Tensor,
    *,
    slot_ids: torch.Tensor | None = None,
    path: torch.Tensor | None = None,
    window: int,
    scrub: bool = False,
    block_table: torch.Tensor | None = None,
) -> None:
    """See layerskip_kernels.ops.kv_rollback."""
    check(k_cache=k_cache, v_cache=v_cache, lengths=lengths, keep=keep, slot_ids=slot_ids, path=path)
    layers, _, groups, _, dim = k_cache.shape
    batch = lengths.shape[0]
    with guard(k_cache):
        if (path is not None or scrub) and layers * batch * groups:
            block_window = triton.next_power_of_2(window)
            block_dim = min(triton.next_power_of_2(dim), max(16, 4096 // block_window))
            kv_rollback_kernel[(layers * groups, batch, triton.cdiv(dim, block_dim))](
                k_cache,
                v_cache,
                lengths,
                keep,
                slot_ids,
                path,
                groups,
                0 if path is None else path.stride(0),
                *k_cache.stride()[:4],
                *v_cache.stride()[:4],
                WINDOW=window,
                DIM=dim,
                SCRUB=scrub,
                ALIGNED=aligned(k_cache, v_cache),
                BLOCK_WINDOW=block_window,
                BLOCK_DIM=block_dim,
                num_warps=4,
                **round_options(k_cache),
            )
        lengths.add_(keep)
