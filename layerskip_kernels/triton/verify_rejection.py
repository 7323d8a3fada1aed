"""Speculative sampling by rejection, in two launches over the probabilities.

`weigh_kernel` sums the weights that the next token may be drawn from, CHUNK tokens per program: at the position where
the row stopped ("standard"), or at every position ("block", which needs them all to decide where it stops).
`decide_kernel`, one program per sequence, decides the accepted length, finds the chunk that holds the draw from the
chunks' sums, and the token inside it. All sums are float64: by `tree_sum` inside a chunk, then over the chunks.

Bound by bytes: 8 · B · V for standard, 8 · B · K · V for block, 3 operations an element. Expected on an H100
(3.35 TB/s), not measured: B = 1, V = 128256, standard: 1 MB, so the two launches (about 5 µs) decide; B = 64, K = 6,
block: 0.4 GB, 120 µs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerskip_kernels.ops.verify_tokens import Verified
from layerskip_kernels.triton.launch import EXACT, check, guard, row_offset
from layerskip_kernels.triton.sums import tree_sum
from layerskip_kernels.triton.verify_tokens import emit, outputs

CHUNK = 2048  # tokens
WARPS = 8  # with 4, the float64 of a chunk do not fit into registers
_STRIDES = ["stride_draft", "stride_qb", "stride_qt", "stride_pb", "stride_pt", "stride_ub", "stride_ut"]


@triton.jit
def accept_standard(draft_ptr, q_ptr, p_ptr, u_ptr, n, stride_qt, stride_pt, stride_ut):
    """How many drafts come before the first that fails uniform · q < p (Leviathan et al., algorithm 1)."""
    accepted = 0
    for i in range(n):
        token = tl.load(draft_ptr + i)
        q, p = tl.load(q_ptr + token).to(tl.float64), tl.load(p_ptr + token).to(tl.float64)
        passes = tl.load(u_ptr).to(tl.float64) * q < p
        accepted = tl.where(passes, tl.where(accepted == i, i + 1, accepted), accepted)
        q_ptr += stride_qt
        p_ptr += stride_pt
        u_ptr += stride_ut
    return accepted


@triton.jit
def next_ratio(ratio, draft_ptr, q_ptr, p_ptr, i):
    """r_{i+1} of r_i; q and p are those of draft i."""
    token = tl.load(draft_ptr + i)
    ratio *= tl.load(p_ptr + token).to(tl.float64) / tl.load(q_ptr + token).to(tl.float64)
    return tl.where(ratio > 1.0, 1.0, ratio)


@triton.jit
def block_ratio(draft_ptr, q_ptr, p_ptr, steps, stride_qt, stride_pt):
    """r_steps: r_0 = 1, r_i = min(r_{i-1} · p_i(x_i) / q_i(x_i), 1) (Sun et al., algorithm 2)."""
    ratio = tl.full([], 1.0, tl.float64)
    for i in range(steps):
        ratio = next_ratio(ratio, draft_ptr, q_ptr, p_ptr, i)
        q_ptr += stride_qt
        p_ptr += stride_pt
    return ratio


@triton.jit
def draw_weights(q_ptr, p_ptr, position, n, ratio, column, vocab, stride_qt, stride_pt):
    """max(ratio · p - q, 0) at `position` for the tokens `column`, or p where position >= n; float64."""
    p_ptr += row_offset(position, stride_pt, False)
    q_ptr += row_offset(position, stride_qt, False)
    drafted = column < tl.where(position < n, vocab, 0)
    p = tl.load(p_ptr + column, mask=column < vocab, other=0.0).to(tl.float64)
    q = tl.load(q_ptr + column, mask=drafted, other=0.0).to(tl.float64)
    return tl.where(drafted, tl.maximum(ratio * p - q, 0.0), p)


@triton.jit
def first_past(goal, ends, weights, index):
    """The lowest `index` of positive weight whose end lies past `goal`; the last of positive weight if none does.

    `ends` come from a scan that adds in the order of a tree: they may rise by a rounding where the weight is zero.
    """
    last = tl.max(tl.where(weights > 0.0, index, 0), axis=0)
    return tl.min(tl.where((weights > 0.0) & (ends > goal), index, last), axis=0)


@triton.jit(do_not_specialize=["vocab", *_STRIDES])
def weigh_kernel(
    draft_ptr,
    q_ptr,
    p_ptr,
    u_ptr,
    num_draft_ptr,
    finished_ptr,
    sums_ptr,
    vocab,
    stride_draft,
    stride_qb,
    stride_qt,
    stride_pb,
    stride_pt,
    stride_ub,
    stride_ut,
    BLOCK_METHOD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    position = tl.program_id(1)
    b = tl.program_id(2)
    sums_ptr += (b.to(tl.int64) * tl.num_programs(1) + position) * tl.num_programs(0) + chunk
    draft_ptr += row_offset(b, stride_draft, False)
    q_ptr += row_offset(b, stride_qb, False)
    p_ptr += row_offset(b, stride_pb, False)
    u_ptr += row_offset(b, stride_ub, False)
    # A finished sequence's drafts and probabilities may hold anything.
    n = tl.where(tl.load(finished_ptr + b).to(tl.int32) != 0, 0, tl.load(num_draft_ptr + b))
    if BLOCK_METHOD:
        ratio = block_ratio(draft_ptr, q_ptr, p_ptr, tl.minimum(position, n), stride_qt, stride_pt)
    else:
        ratio = tl.full([], 1.0, tl.float64)
        position = accept_standard(draft_ptr, q_ptr, p_ptr, u_ptr, n, stride_qt, stride_pt, stride_ut)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(sums_ptr, tree_sum(draw_weights(q_ptr, p_ptr, position, n, ratio, column, vocab, stride_qt, stride_pt)))


@triton.jit(do_not_specialize=["vocab", "num_eos", *_STRIDES, "stride_out"])
def decide_kernel(
    draft_ptr,
    q_ptr,
    p_ptr,
    u_ptr,
    num_draft_ptr,
    eos_ptr,
    remaining_ptr,
    finished_ptr,
    tokens_out_ptr,
    emitted_out_ptr,
    accepted_out_ptr,
    finished_out_ptr,
    sums_ptr,
    vocab,
    num_eos,
    stride_draft,
    stride_qb,
    stride_qt,
    stride_pb,
    stride_pt,
    stride_ub,
    stride_ut,
    stride_out,
    BLOCK_METHOD: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    b = tl.program_id(0)
    draft_ptr += row_offset(b, stride_draft, False)
    q_ptr += row_offset(b, stride_qb, False)
    p_ptr += row_offset(b, stride_pb, False)
    u_ptr += row_offset(b, stride_ub, False)
    n = tl.where(tl.load(finished_ptr + b).to(tl.int32) != 0, 0, tl.load(num_draft_ptr + b))
    chunk = tl.arange(0, BLOCK_CHUNKS)
    exists = chunk < NUM_CHUNKS

    accepted_ratio = tl.full([], 1.0, tl.float64)
    if BLOCK_METHOD:
        sums_ptr += b.to(tl.int64) * WIDTH * NUM_CHUNKS
        accepted = 0
        ratio = accepted_ratio
        q_row, p_row = q_ptr, p_ptr
        for i in range(1, n + 1):
            ratio = next_ratio(ratio, draft_ptr, q_row, p_row, i - 1)
            q_row += stride_qt
            p_row += stride_pt
            left = tree_sum(tl.load(sums_ptr + i * NUM_CHUNKS + chunk, mask=exists, other=0.0))
            rest = left + 1.0 - ratio
            threshold = tl.where(rest > 0.0, left / tl.where(rest > 0.0, rest, 1.0), 1.0)
            threshold = tl.where(i == n, ratio, threshold)
            passes = tl.load(u_ptr + row_offset(tl.zeros([], tl.int32) + i - 1, stride_ut, False)) < threshold
            accepted = tl.where(passes, i, accepted)
            accepted_ratio = tl.where(passes, ratio, accepted_ratio)
        sums_ptr += accepted * NUM_CHUNKS
    else:
        sums_ptr += b.to(tl.int64) * NUM_CHUNKS
        accepted = accept_standard(draft_ptr, q_ptr, p_ptr, u_ptr, n, stride_qt, stride_pt, stride_ut)

    sums = tl.load(sums_ptr + chunk, mask=exists, other=0.0)
    drafts_left = n
    if tl.max(sums, axis=0) <= 0.0:  # p = q up to rounding: nothing is left over, so draw from p
        drafts_left = n * 0
        for c in range(NUM_CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)
            w = draw_weights(q_ptr, p_ptr, accepted, drafts_left, accepted_ratio, column, vocab, stride_qt, stride_pt)
            sums = tl.where(chunk == c, tree_sum(w), sums)

    ends = tl.cumsum(sums, axis=0)
    u = tl.load(u_ptr + row_offset(accepted, stride_ut, False) + 1).to(tl.float64)
    goal = u * tl.max(ends, axis=0)
    chosen = first_past(goal, ends, sums, chunk)
    before = tl.max(tl.where(chunk < chosen, ends, 0.0), axis=0)

    column = chosen * CHUNK + tl.arange(0, CHUNK)
    w = draw_weights(q_ptr, p_ptr, accepted, drafts_left, accepted_ratio, column, vocab, stride_qt, stride_pt)
    token = first_past(goal, before + tl.cumsum(w, axis=0), w, column)

    row = b + tl.arange(0, 1)
    i = tl.arange(0, BLOCK_WIDTH)[None, :]
    accepted = accepted + tl.zeros([1], tl.int32)
    draft = tl.load(draft_ptr + i, mask=i < WIDTH - 1, other=0)
    emit(
        tl.where(i == accepted[:, None], token.to(tl.int64), draft),
        accepted,
        row,
        row >= 0,
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


def verify_rejection(
    draft: torch.Tensor,
    draft_probs: torch.Tensor,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor,
    num_draft: torch.Tensor,
    *,
    method: str = "standard",
    eos_ids: torch.Tensor,
    remaining: torch.Tensor,
    finished: torch.Tensor,
    out: Verified | None = None,
) -> Verified:
    """See layerskip_kernels.ops.verify_rejection."""
    check(draft=draft, draft_probs=draft_probs, target_probs=target_probs, uniforms=uniforms, num_draft=num_draft)
    check(eos_ids=eos_ids, remaining=remaining, finished=finished)
    out = outputs(draft, num_draft, finished, out)
    batch, width, vocab = target_probs.shape
    if not batch:
        return out
    block = method == "block"
    chunk = min(CHUNK, triton.next_power_of_2(vocab))
    chunks = triton.cdiv(vocab, chunk)
    positions = width if block else 1
    sums = torch.empty(batch * positions * chunks, dtype=torch.float64, device=draft.device)
    strides = (
        draft.stride(0),
        *draft_probs.stride()[:2],
        *target_probs.stride()[:2],
        *uniforms.stride()[:2],
    )
    with guard(draft):
        weigh_kernel[(chunks, positions, batch)](
            draft,
            draft_probs,
            target_probs,
            uniforms,
            num_draft,
            finished,
            sums,
            vocab,
            *strides,
            BLOCK_METHOD=block,
            CHUNK=chunk,
            num_warps=WARPS,
            **EXACT,
        )
        decide_kernel[(batch,)](
            draft,
            draft_probs,
            target_probs,
            uniforms,
            num_draft,
            eos_ids,
            remaining,
            finished,
            *out,
            sums,
            vocab,
            eos_ids.shape[0],
            *strides,
            out.tokens.stride(0),
            BLOCK_METHOD=block,
            CHUNK=chunk,
            NUM_CHUNKS=chunks,
            BLOCK_CHUNKS=triton.next_power_of_2(chunks),
            WIDTH=width,
            BLOCK_WIDTH=triton.next_power_of_2(width),
            num_warps=WARPS,
            **EXACT,
        )
    return out
