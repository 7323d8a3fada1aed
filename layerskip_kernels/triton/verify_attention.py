"""Attention of T-token windows over ragged caches, flash-decoding style: two kernels, split and merge.

Split: grid (chunk, KV head x block of query rows, sequence). The query heads of a KV head times the window's rows are
packed into the BLOCK_M rows of `tl.dot`, so a tile of K and V is read once for all of them. Merge: grid (window row x
head, columns of D, sequence), one tile over a row's chunks.

The order of a row's sums is a function of its position, its sliding window and (H, G, D, dtype, device):
- one compiled kernel serves every B, T, slot and length; the tile shapes come from `choose`, which sees only the model;
- chunks start at absolute multiples of their size, which doubles with the row's own position so that a row has at most
  SLOTS of them; where the size doubles inside a window, the rows before and after get a pass each;
- inside a chunk, tiles of BLOCK_N positions follow in ascending order; one that a row does not see leaves its sums
  alone (weights 0, rescaling by exp2(0) = 1);
- a chunk's result is kept under chunk % SLOTS and merged over a tile of SLOTS, absent chunks weighing 0.

Positions that only some rows see may hold Inf or NaN in V, and 0 x NaN would poison the rest. Tiles with such positions
leave them out of the product and give NaN to the rows that do see them. So that this shows nowhere else, a row that
sees Inf or NaN in V, in any column, is NaN whichever tiles it went through.

Roofline (bytes: 2 G D (lengths + T) of K and V; operations: 4 T H D (lengths + T); H100 at 3.35 TB/s, 989 TFLOP/s;
expected, not measured): H = 32, G = 8, bf16,
- D = 128, B = 1, T = 7, 16384 positions: 67 MB, 1.9 GFLOP: 20 us of bandwidth, plus two launches;
- D = 64, B = 16, T = 1, 4096 positions: 134 MB, 0.5 GFLOP: 40 us of bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerskip_kernels.triton import configs, launch

SCRATCH_BYTES = 64 << 20  # of chunk results, unless one row of one sequence needs more
NO_WINDOW = 1 << 30
INTERPRETED = tl.constexpr(launch.INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _chunk_size(span, MIN_CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """Smallest MIN_CHUNK x 2^i of which SLOTS chunks cover `span` positions, wherever they start."""
    size = (span - 1) // ((SLOTS - 1) * MIN_CHUNK)
    for i in tl.static_range(5):  # one less than the next power of two
        size |= size >> (1 << i)
    return (size + 1) * MIN_CHUNK


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b."""
    if INTERPRETED:  # numpy's order of sums depends on the row: each alone
        every = tl.broadcast_to(b[None, :, :], (a.shape[0], b.shape[0], b.shape[1]))
        return acc + tl.reshape(tl.dot(a[:, None, :], every, input_precision="ieee"), acc.shape)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tile(
    acc, total, maximum, q, k_ptr, v_ptr, k_stride, v_stride, start, first, end, row_first, row_end,
    tree_ptr, tree_stride, t, length, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    clean,
):  # fmt: skip
    """One online-softmax step over positions [start, start + BLOCK_N), of which [first, end) are some row's to see."""
    positions, column = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    loaded = ((positions >= first) & (positions < end))[:, None]
    if D < BLOCK_D:
        loaded = loaded & (column < D)[None, :]
    origin = tl.full([], start, tl.int64)
    offset = tl.arange(0, BLOCK_N)[:, None]
    k = tl.load(k_ptr + origin * k_stride + (offset * k_stride + column[None, :]), mask=loaded, other=0.0)
    if INTERPRETED:
        k = k.to(tl.float32)
    visible = (positions[None, :] >= row_first[:, None]) & (positions[None, :] < row_end[:, None])
    if tree_ptr is not None:
        u = positions - length
        inside = (positions >= length) & (positions < end)
        sees = tl.load(
            tree_ptr + t[:, None].to(tl.int64) * tree_stride + u[None, :],
            mask=inside[None, :] & (row_end > 0)[:, None],
            other=0,
        )
        visible = visible & ((positions < length)[None, :] | (sees != 0))
    scores = _dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32)) * scale
    scores = tl.where(visible, scores, float("-inf"))
    v = tl.load(v_ptr + origin * v_stride + (offset * v_stride + column[None, :]), mask=loaded, other=0.0)
    if INTERPRETED:
        v = v.to(tl.float32)
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    rescale = tl.exp2((maximum - shift) * LOG2_E)
    p = tl.exp2((scores - shift[:, None]) * LOG2_E)
    total = tl.fma(total, rescale, tl.sum(p, axis=1))
    acc = acc * rescale[:, None]
    if clean:
        # 0 * v is 0, unless v is Inf or NaN. A product asks, not a comparison, and the rare tile that holds some is
        # loaded again: only what is never anything but an operand lies in shared memory without bank conflicts.
        asked = _dot(tl.zeros([16, BLOCK_N], v.dtype), v, tl.zeros([16, BLOCK_D], tl.float32))
        clean = tl.max(tl.max(tl.where(asked == 0.0, 0, 1), axis=1), axis=0) > 0
    if clean:
        again = tl.load(v_ptr + origin * v_stride + (offset * v_stride + column[None, :]), mask=loaded, other=0.0)
        poison = tl.max(tl.where(tl.abs(again.to(tl.float32)) < float("inf"), 0, 1), axis=1)
        poisoned = tl.max(tl.where(visible, poison[None, :], 0), axis=1)
        total = tl.where(poisoned > 0, float("nan"), total)
        v_clean = tl.where((poison > 0)[:, None], 0.0, again).to(v.dtype)
        acc = _dot(p.to(v.dtype), v_clean, acc)
    else:
        acc = _dot(p.to(v.dtype), v, acc)
    return acc, total, new_maximum


_VARYING = (
    "lengths_ptr slot_ids_ptr num_queries_ptr tree_ptr first_batch first_row rows window slots_held sliding_window "
    "slack q_stride_b q_stride_t q_stride_h k_stride_slot k_stride_g k_stride_s v_stride_slot v_stride_g v_stride_s "
    "tree_stride"
).split()


@triton.jit(do_not_specialize=_VARYING)
def verify_attention_split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, slot_ids_ptr, num_queries_ptr, tree_ptr, partial_ptr, stats_ptr,
    first_batch, first_row, rows, window, slots_held, sliding_window, slack, scale,
    q_stride_b, q_stride_t, q_stride_h, k_stride_slot, k_stride_g, k_stride_s, v_stride_slot, v_stride_g, v_stride_s,
    tree_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_CHUNK: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    VECTOR: tl.constexpr, Q_VECTOR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Window rows [first_row, first_row + rows) of the sequences from first_batch on; strides in units of a VECTOR."""
    launch.follow_previous_kernels(OVERLAP)
    program, local_b = tl.program_id(0), tl.program_id(2)
    g, block = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    b = local_b + first_batch
    length = tl.load(lengths_ptr + b)
    queries = window
    if num_queries_ptr is not None:
        queries = tl.load(num_queries_ptr + b)
    stop_row = tl.minimum(first_row + rows, queries)
    first_t = first_row + block * BLOCK_M // GROUP
    last_t = tl.minimum(first_row + (block * BLOCK_M + BLOCK_M - 1) // GROUP, stop_row - 1)
    if first_t >= stop_row:
        return
    # What any row, and what every row of the block sees.
    first = tl.maximum(length + first_t + 1 - sliding_window, 0)
    shared_first = tl.maximum(length + last_t + 1 - sliding_window, 0)
    end = length + last_t + 1
    shared_end = length + first_t + 1
    if tree_ptr is not None:
        end = length + queries
        shared_end = length
    chunk_size = _chunk_size(tl.minimum(length + first_t + 1, sliding_window) + slack, MIN_CHUNK, SLOTS)
    largest = _chunk_size(tl.minimum(length + last_t + 1, sliding_window) + slack, MIN_CHUNK, SLOTS)
    chunk = first // chunk_size
    chunk += (program - chunk) & (SLOTS - 1)
    if (chunk * chunk_size >= end) & (chunk_size == largest):
        return  # no chunk of these rows is this program's
    slot = b
    if slot_ids_ptr is not None:
        slot = tl.load(slot_ids_ptr + b)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    t = first_row + row // GROUP
    real = t < stop_row
    head = g * GROUP + row % GROUP
    column = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr
        + b.to(tl.int64) * q_stride_b * Q_VECTOR
        + (t.to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h)[:, None] * Q_VECTOR
        + column[None, :],
        mask=real[:, None] & (column < D)[None, :],
        other=0.0,
    )
    if INTERPRETED:
        q = q.to(tl.float32)

    # What each row sees: [row_first, row_end), in a tree with gaps.
    position = length + t
    row_first = tl.maximum(position + 1 - sliding_window, 0)
    row_end = tl.where(real, position + 1, 0)
    if tree_ptr is not None:
        row_end = tl.where(real, length + queries, 0)
    size = _chunk_size(tl.minimum(position + 1, sliding_window) + slack, MIN_CHUNK, SLOTS)

    k_stride, v_stride = k_stride_s * VECTOR, v_stride_s * VECTOR
    k_ptr += (slot.to(tl.int64) * k_stride_slot + g.to(tl.int64) * k_stride_g) * VECTOR
    v_ptr += (slot.to(tl.int64) * v_stride_slot + g.to(tl.int64) * v_stride_g) * VECTOR

    while chunk_size <= largest:
        chunk = first // chunk_size
        chunk += (program - chunk) & (SLOTS - 1)
        while chunk * chunk_size < end:
            begin = tl.maximum(chunk * chunk_size, first // BLOCK_N * BLOCK_N)
            stop = tl.minimum((chunk + 1) * chunk_size, end)
            # Every row sees all of the tiles in [shared_begin, shared_stop).
            shared_begin, shared_stop = begin, stop
            if shared_first > first:
                shared_begin = tl.minimum(tl.maximum(tl.cdiv(shared_first, BLOCK_N) * BLOCK_N, begin), stop)
            if shared_end < end:
                shared_stop = tl.minimum(tl.maximum(shared_end // BLOCK_N * BLOCK_N, shared_begin), stop)

            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
            for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
                clean = (start < shared_begin) | (start >= shared_stop)
                acc, total, maximum = _tile(
                    acc, total, maximum, q, k_ptr, v_ptr, k_stride, v_stride, start, first, end, row_first,
                    row_end, tree_ptr, tree_stride, t, length, scale, D, BLOCK_D, BLOCK_N, clean,
                )  # fmt: skip
            finite = tl.min(tl.where(tl.abs(acc) < float("inf"), 1, 0), axis=1) > 0
            total = tl.where(finite, total, float("nan"))
            mine = real & (size == chunk_size)
            mine = mine & (chunk >= row_first // chunk_size) & (chunk * chunk_size < row_end)
            index = ((local_b * rows + t - first_row) * (KV_HEADS * GROUP) + head).to(tl.int64) * slots_held
            index += chunk & (SLOTS - 1)
            tl.store(stats_ptr + index * 2, maximum, mask=mine)
            tl.store(stats_ptr + index * 2 + 1, total, mask=mine)
            tl.store(
                partial_ptr + index[:, None] * D + column[None, :], acc, mask=mine[:, None] & (column < D)[None, :]
            )
            chunk += SLOTS
        chunk_size *= 2


@triton.jit(
    do_not_specialize=(
        "partial_ptr stats_ptr lengths_ptr num_queries_ptr first_batch first_row rows window slots_held sliding_window "
        "slack out_stride_b out_stride_t out_stride_h"
    ).split()
)
def verify_attention_merge_kernel(
    partial_ptr, stats_ptr, out_ptr, lengths_ptr, num_queries_ptr, first_batch, first_row, rows, window, slots_held,
    sliding_window, slack, out_stride_b, out_stride_t, out_stride_h, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, MIN_CHUNK: tl.constexpr, SLOTS: tl.constexpr, TREE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one window row, BLOCK_D columns; rows past num_queries become zero."""
    launch.follow_previous_kernels(OVERLAP)
    blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    t, local_b = first_row + tl.program_id(0) // blocks, tl.program_id(2)
    b = local_b + first_batch
    head = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    length = tl.load(lengths_ptr + b)
    queries = window
    if num_queries_ptr is not None:
        queries = tl.load(num_queries_ptr + b)
    position = length + t
    row_first = tl.maximum(position + 1 - sliding_window, 0)
    row_end = position + 1
    if TREE:
        row_end = length + queries
    size = _chunk_size(tl.minimum(position + 1, sliding_window) + slack, MIN_CHUNK, SLOTS)
    first = row_first // size
    chunks = tl.where(t < queries, (row_end - 1) // size - first + 1, 0)
    slot = tl.arange(0, SLOTS)
    held = (((slot - first) & (SLOTS - 1)) < chunks)[None, :] & (head < HEADS)[:, None]

    index = ((local_b * rows + t - first_row) * HEADS + head).to(tl.int64)[:, None] * slots_held + slot[None, :]
    maximum = tl.load(stats_ptr + index * 2, mask=held, other=float("-inf"))
    total = tl.load(stats_ptr + index * 2 + 1, mask=held, other=0.0)
    # Said here, not left to what Triton makes of the pointer: the layout, and with it the order of sums, hangs on it.
    partial_ptrs = tl.multiple_of(partial_ptr + index[:, :, None] * D, (16, 16, 16))
    partial = tl.load(
        partial_ptrs + column[None, None, :],
        mask=held[:, :, None] & (column < D)[None, None, :],
        other=0.0,
    )
    highest = tl.max(maximum, axis=1)
    weight = tl.exp2((maximum - tl.where(highest == float("-inf"), 0.0, highest)[:, None]) * LOG2_E)
    result = tl.sum(weight[:, :, None] * partial, axis=1) / tl.sum(weight * total, axis=1)[:, None]
    result = launch.cast(tl.where(t < queries, result, 0.0), out_ptr.dtype.element_ty)
    out_ptr += b.to(tl.int64) * out_stride_b + t.to(tl.int64) * out_stride_t
    out_offset = head[:, None].to(tl.int64) * out_stride_h + column[None, :]
    tl.store(out_ptr + out_offset, result, mask=(head < HEADS)[:, None] & (column < D)[None, :])


def choose(heads: int, groups: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Settings where no tuned ones are known; larger tiles spill registers on some architecture.

    BLOCK_M (16 or 32, which take the same matrix instruction everywhere), BLOCK_N, MIN_CHUNK (a multiple of BLOCK_N),
    and SLOTS (a power of two) decide the order of sums, so a model has one of each.
    """
    wide, full = dim > 64, dtype == torch.float32  # float32 has no matrix instruction that keeps its digits
    return dict(
        BLOCK_M=16 if heads // groups <= 2 or full else 32,
        BLOCK_N=(32 if full else 64) // (2 if wide else 1),
        MIN_CHUNK=64,
        SLOTS=min(128, max(16, triton.next_power_of_2(256 // groups))),  # with one sequence, about 256 programs
        num_warps=8 if dim > 128 else 4,
        num_stages=2 if dim * dtype.itemsize > 256 else 3,
    )


def split_constexprs(
    heads: int, groups: int, dim: int, vector: int, q_vector: int, config: dict[str, int]
) -> dict[str, int]:
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "MIN_CHUNK", "SLOTS")}
    tile |= dict(BLOCK_D=max(16, triton.next_power_of_2(dim)), VECTOR=vector, Q_VECTOR=q_vector)
    tile["STAGES"] = config["num_stages"]
    return dict(KV_HEADS=groups, GROUP=heads // groups, D=dim, **tile)


def merge_constexprs(heads: int, dim: int, tree: bool, config: dict[str, int]) -> dict[str, int | bool]:
    block_h, block_d = 1, max(16, triton.next_power_of_2(dim))
    if launch.INTERPRETED:  # it pays per program
        block_h = triton.next_power_of_2(heads)
    else:
        block_d = max(16, min(block_d, 4096 // config["SLOTS"]))
    chunks = {name: config[name] for name in ("MIN_CHUNK", "SLOTS")}
    return dict(HEADS=heads, D=dim, BLOCK_H=block_h, BLOCK_D=block_d, TREE=tree, **chunks)


def verify_attention(
    q, k_cache, v_cache, *, lengths, scale, slot_ids=None, num_queries=None, tree_mask=None, sliding_window=None,
    block_table=None, out=None,
):  # fmt: skip
    """See layerskip_kernels.ops.verify_attention."""
    launch.check(
        q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths, slot_ids=slot_ids, num_queries=num_queries,
        tree_mask=tree_mask, out=out,
    )  # fmt: skip
    batch, window, heads, dim = q.shape
    groups, capacity = k_cache.shape[1], k_cache.shape[2]
    out = q.new_empty(q.shape) if out is None else out
    if out.numel() == 0:
        return out
    config = configs.tuned("verify_attention", q, choose(heads, groups, dim, q.dtype), D=dim, G=groups, H=heads)
    vector, q_vector = launch.stride_unit(k_cache, v_cache), launch.stride_unit(q)
    split = split_constexprs(heads, groups, dim, vector, q_vector, config)
    merge = merge_constexprs(heads, dim, tree_mask is not None, config)
    merge_grid = triton.cdiv(heads, merge["BLOCK_H"]), triton.cdiv(dim, merge["BLOCK_D"])
    slots_held = min(config["SLOTS"], triton.cdiv(capacity, config["MIN_CHUNK"]))
    slack = 0 if tree_mask is None else triton.cdiv(window, 64) * 64  # positions behind a row's own that it may see
    q_strides = [stride // q_vector for stride in q.stride()[:3]]
    kv_strides = [stride // vector for cache in (k_cache, v_cache) for stride in cache.stride()[:3]]
    tree_stride = 0 if tree_mask is None else tree_mask.stride(0)

    # Long windows of many sequences are served in parts, which moves no bit.
    row_bytes = heads * slots_held * (dim + 2) * 4
    fitting = max(1, SCRATCH_BYTES // row_bytes)
    rows, sequences = min(fitting, window), max(1, min(fitting // window, batch))
    scratch = torch.empty(rows * sequences * row_bytes // 4, dtype=torch.float32, device=q.device)
    stats = scratch[rows * sequences * heads * slots_held * dim :]
    how = launch.round_options(q)
    with launch.guard(q):
        for first_batch in range(0, batch, sequences):
            for first_row in range(0, window, rows):
                count, held_rows = min(sequences, batch - first_batch), min(rows, window - first_row)
                blocks = triton.cdiv(held_rows * (heads // groups), config["BLOCK_M"])
                where = (first_batch, first_row, held_rows, window, slots_held, sliding_window or NO_WINDOW, slack)
                verify_attention_split_kernel[(slots_held, groups * blocks, count)](
                    q, k_cache, v_cache, lengths, slot_ids, num_queries, tree_mask, scratch, stats, *where, scale,
                    *q_strides, *kv_strides, tree_stride, **split, num_warps=config["num_warps"], **how,
                )  # fmt: skip
                verify_attention_merge_kernel[(held_rows * merge_grid[0], merge_grid[1], count)](
                    scratch, stats, out, lengths, num_queries, *where, *out.stride()[:3], **merge, **how
                )
    return out
