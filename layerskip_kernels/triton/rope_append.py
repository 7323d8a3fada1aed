"""Rotate q in place; rotate k and append it, with v, to the cache. One program per window row and BLOCK_HEADS heads:
the first programs of a row rotate q, the rest do k and v. Elementwise, nothing is summed.

Bound by bytes: B · T · (2 H + 4 G) · D · itemsize, about 8 operations an element. Expected on an H100 (3.35 TB/s), not
measured: B·T = 8, H = 32, G = 8, D = 128, bfloat16: 0.2 MB, so the launch (about 2 µs) decides; B·T = 512: 13 MB, 4 µs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerskip_kernels.triton.launch import (
    aligned,
    cast,
    check,
    follow_previous_kernels,
    guard,
    round_options,
    row_offset,
)

_VARYING = ["lengths_ptr", "positions_ptr", "slot_ids_ptr", "num_queries_ptr", "window", "heads", "groups"] + [
    f"stride_{n}" for n in "qb qt qh kb kt kg vb vt vg ks_slot ks_g ks_s vs_slot vs_g vs_s pos freq_b freq_t".split()
]


@triton.jit(do_not_specialize=_VARYING)
def rope_append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    positions_ptr,
    inv_freq_ptr,
    slot_ids_ptr,
    num_queries_ptr,
    attention_factor,
    window,
    heads,
    groups,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kg,
    stride_vb,
    stride_vt,
    stride_vg,
    stride_ks_slot,
    stride_ks_g,
    stride_ks_s,
    stride_vs_slot,
    stride_vs_g,
    stride_vs_s,
    stride_pos,
    stride_freq_b,
    stride_freq_t,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow_previous_kernels(OVERLAP)
    b = tl.program_id(0) // window
    t = tl.program_id(0) % window
    q_blocks = tl.cdiv(heads, BLOCK_HEADS)
    head_block = tl.program_id(1)
    i = tl.arange(0, BLOCK_HALF)
    i_inside = i < HALF

    if num_queries_ptr is not None:
        real = t < tl.load(num_queries_ptr + b)
        heads, groups = tl.where(real, heads, 0), tl.where(real, groups, 0)

    position = tl.load(positions_ptr + b.to(tl.int64) * stride_pos + t)
    frequency = b.to(tl.int64) * stride_freq_b + t.to(tl.int64) * stride_freq_t
    angle = position.to(tl.float32) * tl.load(inv_freq_ptr + frequency + i, mask=i_inside, other=0.0)
    cos, sin = cos_and_sin(angle)
    cos, sin = (cos * attention_factor)[None, :], (sin * attention_factor)[None, :]

    if head_block < q_blocks:
        head = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < heads)[:, None] & i_inside[None, :]
        q_ptr += row_offset(b, stride_qb, ALIGNED) + row_offset(t, stride_qt, ALIGNED)
        first = q_ptr + row_offset(head, stride_qh, ALIGNED)[:, None] + i[None, :]
        rotate(first, first, cos, sin, inside, HALF)
    else:
        head = (head_block - q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < groups)[:, None] & i_inside[None, :]
        slot = b
        if slot_ids_ptr is not None:
            slot = tl.load(slot_ids_ptr + b)
        storage = tl.load(lengths_ptr + b) + t

        k_ptr += row_offset(b, stride_kb, ALIGNED) + row_offset(t, stride_kt, ALIGNED)
        k_cache_ptr += row_offset(slot, stride_ks_slot, ALIGNED) + row_offset(storage, stride_ks_s, ALIGNED)
        source = k_ptr + row_offset(head, stride_kg, ALIGNED)[:, None] + i[None, :]
        target = k_cache_ptr + row_offset(head, stride_ks_g, ALIGNED)[:, None] + i[None, :]
        rotate(source, target, cos, sin, inside, HALF)

        v_ptr += row_offset(b, stride_vb, ALIGNED) + row_offset(t, stride_vt, ALIGNED)
        v_cache_ptr += row_offset(slot, stride_vs_slot, ALIGNED) + row_offset(storage, stride_vs_s, ALIGNED)
        source = v_ptr + row_offset(head, stride_vg, ALIGNED)[:, None] + i[None, :]
        target = v_cache_ptr + row_offset(head, stride_vs_g, ALIGNED)[:, None] + i[None, :]
        tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)
        tl.store(target + HALF, tl.load(source + HALF, mask=inside, other=0.0), mask=inside)


@triton.jit
def cos_and_sin(angle):
    """To about an ulp, also of large angles, whose multiples of π/2 are taken off in float64.

    The library's float32 functions do that with tables in local memory, and twice.
    """
    quarters = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)  # 2/π
    x = (angle.to(tl.float64) - quarters * 1.5707963267948966).to(tl.float32)  # |x| <= π/4
    z = x * x
    cos = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 - z * (1 / 3628800)))))
    sin = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    quadrant = quarters.to(tl.int64) & 3
    odd = (quadrant & 1) != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -cos, cos), tl.where(quadrant >= 2, -sin, sin)


@triton.jit
def rotate(source, target, cos, sin, inside, HALF: tl.constexpr):
    """Element i is paired with i + HALF."""
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, cast(a * cos - b * sin, target.dtype.element_ty), mask=inside)
    tl.store(target + HALF, cast(b * cos + a * sin, target.dtype.element_ty), mask=inside)


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
    """See layerskip_kernels.ops.rope_append."""
    check(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, lengths=lengths, positions=positions, inv_freq=inv_freq)
    check(slot_ids=slot_ids, num_queries=num_queries)
    batch, window, heads, dim = q.shape
    groups = k.shape[2]
    if not batch * window:
        return
    half = dim // 2
    block_half = triton.next_power_of_2(half)
    block_heads = max(1, 512 // block_half)
    grid = (batch * window, triton.cdiv(heads, block_heads) + triton.cdiv(groups, block_heads))
    with guard(q):
        rope_append_kernel[grid](
            q,
            k,
            v,
            k_cache,
            v_cache,
            lengths,
            positions,
            inv_freq,
            slot_ids,
            num_queries,
            float(attention_factor),
            window,
            heads,
            groups,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            positions.stride(0),
            *(inv_freq.stride()[:2] if inv_freq.dim() == 3 else (0, 0)),
            HALF=half,
            ALIGNED=aligned(q, k, v, k_cache, v_cache),
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=block_half,
            num_warps=2,
            **round_options(q),
        )
