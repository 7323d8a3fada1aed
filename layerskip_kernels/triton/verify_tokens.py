"""Accept the longest prefix of the drafts that equals the target's tokens, on the device: integers only.

One program per BLOCK_ROWS sequences. Moves 8 · B · (2 K + 1) bytes in and as many out: B = 64, K = 15 is 24 KB, B = 1,
K = 6 is 160 bytes. On an H100 both are one launch, about 2 µs (expected, not measured).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerskip_kernels.ops.verify_tokens import Verified
from layerskip_kernels.triton.launch import check, follow_previous_kernels, guard, round_options, row_offset


@triton.jit(do_not_specialize=["batch", "num_eos", "stride_draft", "stride_target", "stride_out"])
def verify_tokens_kernel(
    draft_ptr,
    target_ptr,
    num_draft_ptr,
    eos_ptr,
    remaining_ptr,
    finished_ptr,
    tokens_out_ptr,
    emitted_out_ptr,
    accepted_out_ptr,
    finished_out_ptr,
    batch,
    num_eos,
    stride_draft,
    stride_target,
    stride_out,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow_previous_kernels(OVERLAP)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = tl.arange(0, BLOCK_WIDTH)[None, :]
    exists = row < batch
    drafted = exists[:, None] & (i < WIDTH - 1)
    draft = tl.load(draft_ptr + row_offset(row, stride_draft, False)[:, None] + i, mask=drafted, other=0)
    targets = target_ptr + row_offset(row, stride_target, False)[:, None] + i
    target = tl.load(targets, mask=exists[:, None] & (i < WIDTH), other=0)
    num_draft = tl.load(num_draft_ptr + row, mask=exists, other=0)
    equal = drafted & (i < num_draft[:, None]) & (draft == target)
    accepted = tl.min(tl.where(equal, BLOCK_WIDTH, i), axis=1)
    emit(
        target,
        accepted,
        row,
        exists,
        eos_ptr,
        remaining_ptr,
        finished_ptr,
        tokens_out_ptr,
        emitted_out_ptr,
        accepted_out_ptr,
        finished_out_ptr,
        num_eos,
        stride_out,
        WIDTH,
        BLOCK_WIDTH,
    )


@triton.jit
def emit(
    tokens,
    accepted,
    row,
    exists,
    eos_ptr,
    remaining_ptr,
    finished_ptr,
    tokens_out_ptr,
    emitted_out_ptr,
    accepted_out_ptr,
    finished_out_ptr,
    num_eos,
    stride_out,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """``tokens[:, : accepted + 1]`` cut after the first EOS and at `remaining`; nothing for finished sequences."""
    i = tl.arange(0, BLOCK_WIDTH)[None, :]
    remaining = tl.load(remaining_ptr + row, mask=exists, other=0)
    finished = tl.load(finished_ptr + row, mask=exists, other=1).to(tl.int32)
    emitted = tl.minimum(accepted + 1, tl.maximum(remaining, 0))
    emitted = tl.where(finished != 0, 0, emitted)
    is_eos = tl.zeros(tokens.shape, tl.int32)
    for e in range(num_eos):
        is_eos |= (tokens == tl.load(eos_ptr + e)).to(tl.int32)
    first_eos = tl.min(tl.where((is_eos != 0) & (i < emitted[:, None]), i, BLOCK_WIDTH), axis=1)
    emitted = tl.minimum(emitted, first_eos + 1)
    done = (finished != 0) | (first_eos < BLOCK_WIDTH) | (emitted >= remaining)
    tl.debug_barrier()  # finished_out may be finished: every thread has read it
    kept = tl.where(i < emitted[:, None], tokens, -1)
    out = tokens_out_ptr + row_offset(row, stride_out, False)[:, None] + i
    tl.store(out, kept, mask=exists[:, None] & (i < WIDTH))
    tl.store(emitted_out_ptr + row, emitted, mask=exists)
    tl.store(accepted_out_ptr + row, tl.minimum(accepted, emitted), mask=exists)
    tl.store(finished_out_ptr + row, done, mask=exists)


def verify_tokens(
    draft: torch.Tensor,
    target: torch.Tensor,
    num_draft: torch.Tensor,
    *,
    eos_ids: torch.Tensor,
    remaining: torch.Tensor,
    finished: torch.Tensor,
    out: Verified | None = None,
) -> Verified:
    """See layerskip_kernels.ops.verify_tokens."""
    check(draft=draft, target=target, num_draft=num_draft, eos_ids=eos_ids, remaining=remaining, finished=finished)
    out = outputs(draft, num_draft, finished, out)
    batch, width = target.shape
    if batch:
        block_width = triton.next_power_of_2(width)
        block_rows = max(1, 256 // block_width)
        with guard(draft):
            verify_tokens_kernel[(triton.cdiv(batch, block_rows),)](
                draft,
                target,
                num_draft,
                eos_ids,
                remaining,
                finished,
                *out,
                batch,
                eos_ids.shape[0],
                draft.stride(0),
                target.stride(0),
                out.tokens.stride(0),
                WIDTH=width,
                BLOCK_ROWS=block_rows,
                BLOCK_WIDTH=block_width,
                num_warps=1,
                **round_options(draft),
            )
    return out


def outputs(draft, num_draft, finished, out: Verified | None) -> Verified:
    """`out`, checked, or new tensors."""
    if out is None:
        return Verified(
            draft.new_empty(draft.shape[0], draft.shape[1] + 1),
            torch.empty_like(num_draft),
            torch.empty_like(num_draft),
            torch.empty_like(finished),
        )
    check(tokens=out.tokens, num_emitted=out.num_emitted, num_accepted=out.num_accepted, finished=out.finished)
    return out
