"""RMSNorm, LM head and the choice of the token: one pass over the head's weights, then one program per row.

`exit_head_kernel`: grid tiles of up to 64 rows by chunks of BLOCK_N tokens. A chunk's logits stay in registers; what
leaves is the chunk's largest logit, sum of exponentials and best score with its token. `choose_kernel` merges the
chunks. Nothing of size [N, V] is written unless logits were asked for or a filter needs them. Both add in the order
of `_tree_sum`, chunks are the same for every N, and K is never split (linear_tile.py): a row depends on itself alone.

Top-k, top-p and min-p keep every token whose score reaches a threshold, so they need neither sort nor threshold: of
the unfiltered draw, known from the first pass, it is enough to ask whether it is kept, by counting or weighing the
tokens above it. If it is not, neither is anything below it, and the best of those above it is the next to ask. Under
top-p the first question settles it with probability p. A pass over the vocabulary keeps a result per place in its
blocks, which are combined once at its end: no barrier, so that loads overlap.

Bound by the bytes of the head: V · C · itemsize; 2 · N · V · C operations, on matrix instructions. Expected on an H100
(3.35 TB/s, 989 TFLOP/s), not measured, bfloat16, N = 8: V = 128256, C = 2048: 525 MB, 8.4 GFLOP (rows filled up to
16), 160 µs; V = 128256, C = 4096: 1.05 GB, 17 GFLOP, 315 µs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerskip_kernels.ops.exit_head import ExitHead, RepetitionPenalty, Sampling
from layerskip_kernels.triton.configs import tuned
from layerskip_kernels.triton.launch import (
    INTERPRETED,
    check,
    follow_previous_kernels,
    guard,
    num_sms,
    round_options,
    stride_unit,
)
from layerskip_kernels.triton.linear_tile import ROWS, products, row_tiles, tile_config
from layerskip_kernels.triton.philox import gumbel_noise
from layerskip_kernels.triton.rms_norm import rms_norm

CHOOSE_ROWS = 64 if INTERPRETED else 1  # rows per program of the second kernel: the interpreter pays per program
CHOOSE_BLOCK = 1024 if INTERPRETED else 4096  # tokens at a time, where a filter looks at all of them
NONE = 0x7FFFFFFF  # above every token
_ROWS, _NONE = tl.constexpr(ROWS), tl.constexpr(NONE)
_INFINITY, _MINUS_INFINITY = tl.constexpr(float("inf")), tl.constexpr(float("-inf"))


@triton.jit
def _tree_sum(x):
    """Sums of the rows of x [R, a power of two]: its halves are added, then the halves of that, and so on.

    Each `tl.sum` here has two terms, as in `sums.tree_sum`: the same bits in every layout. Halves, since what a thread
    has lies far apart: neighbours would be in other threads. With `tl.split` Triton 3.6 and 3.7 compile for minutes.
    """
    for _ in tl.static_range(20):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), axis=1)
    return tl.max(x, axis=1)  # the one element that is left


@triton.jit
def _finite(x):
    """What exponentials are relative to: x, or 0 where exp(inf - inf) would be NaN."""
    return tl.where((x == _INFINITY) | (x == _MINUS_INFINITY), 0.0, x)


@triton.jit
def _without_nan(x):
    return tl.where(x == x, x, _MINUS_INFINITY)


@triton.jit
def _tanh(x):
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def _first(found, token):
    """The lowest token of each row where `found`."""
    return tl.min(tl.where(found, token, _NONE), axis=1)


@triton.jit
def _filter_settings(
    row, inside, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
):  # fmt: skip
    """The rows' temperature, k, p, min-p, the last three at values that do nothing where off, and which rows filter."""
    temperature = tl.load(temperature_ptr + row, mask=inside, other=0.0)
    k, min_p = tl.zeros_like(row) + V, tl.zeros_like(temperature)
    p = min_p + 1
    if HAS_TOP_K:
        k = tl.load(top_k_ptr + row, mask=inside, other=0)
        k = tl.where((k > 0) & (k < V), k, V)
    if HAS_TOP_P:
        p = tl.load(top_p_ptr + row, mask=inside, other=1.0)
    if HAS_MIN_P:
        min_p = tl.load(min_p_ptr + row, mask=inside, other=0.0)
    return temperature, k, p, min_p, (temperature != 0) & ((k < V) | (p < 1) | (min_p > 0))


@triton.jit(do_not_specialize=["rows", "V", "chunks", "stride_x", "stride_w", "stride_logits", "stride_seen", "share"])
def exit_head_kernel(
    x_ptr, w_ptr, bias_ptr, partial_ptr, best_token_ptr, logits_ptr, perturbed_ptr, factor_ptr, seen_ptr, window_ptr,
    temperature_ptr, seed_ptr, position_ptr, stream_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    rows, V, chunks, stride_x, stride_w, stride_logits, stride_seen, share, logit_scale, softcap,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_PENALTY: tl.constexpr,
    SAMPLED: tl.constexpr, HAS_STREAM: tl.constexpr,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr, KEEP_LOGITS: tl.constexpr,
    TILES: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x is normed. partial: [4, rows, chunks] float32 (largest logit, sum of exponentials relative to it, best score,
    logit of the best), best_token: [rows, chunks] int32. seen, window, share: fields of the `RepetitionPenalty`.
    Filtered rows leave their logits, and their scores with the noise on top in `perturbed` [rows, V]; KEEP_LOGITS: all
    rows leave their logits."""
    follow_previous_kernels(OVERLAP)
    chunk = tl.program_id(1)
    token = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0).to(tl.int64) * (TILES * _ROWS)
    acc0, acc1, acc2, acc3 = products(x_ptr, stride_x, first, rows, w_ptr, stride_w, token, V, C, TILES, BLOCK_K, UNIT)
    exists = (token < V)[None, :]
    for tile in tl.static_range(TILES):
        row = first + tile * _ROWS + tl.arange(0, _ROWS)
        inside = row < rows
        logits = acc0
        if tile == 1:
            logits = acc1
        if tile == 2:
            logits = acc2
        if tile == 3:
            logits = acc3
        if HAS_BIAS:
            logits += tl.load(bias_ptr + token, mask=token < V, other=0.0).to(tl.float32)[None, :]
        logits *= logit_scale
        if HAS_SOFTCAP:
            logits = softcap * _tanh(logits / softcap)
        if HAS_PENALTY:
            factor = tl.load(factor_ptr + row, mask=inside, other=1.0)[:, None]
            window = tl.load(window_ptr + row, mask=inside, other=0)[:, None]
            seen_at = seen_ptr + (row // share * stride_seen)[:, None] + token[None, :]
            seen = tl.load(seen_at, mask=inside[:, None] & exists, other=255) <= window
            logits = tl.where(seen, tl.where(logits < 0, logits * factor, tl.div_rn(logits, factor)), logits)
        logits = tl.where(exists, logits, _MINUS_INFINITY)
        scores = _without_nan(logits)
        largest = tl.max(scores, axis=1)
        total = _tree_sum(tl.exp(logits - _finite(largest)[:, None]))

        keep = inside[:, None] & exists
        if SAMPLED:
            temperature, _, _, _, filtered = _filter_settings(
                row, inside, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P
            )
            seed = tl.load(seed_ptr + row, mask=inside, other=0)
            position = tl.load(position_ptr + row, mask=inside, other=0)
            stream = tl.zeros_like(seed)
            if HAS_STREAM:
                stream = tl.load(stream_ptr + row, mask=inside, other=0)
            noise = gumbel_noise(seed, stream, position, chunk * BLOCK_N, BLOCK_N)
            sampled = (temperature != 0)[:, None]
            drawn = tl.div_rn(scores, tl.where(sampled, temperature[:, None], 1.0)) + noise
            scores = tl.where(sampled, drawn, scores)
            if HAS_TOP_K or HAS_TOP_P or HAS_MIN_P:
                wanted = keep & filtered[:, None]
                tl.store(perturbed_ptr + row[:, None] * V + token[None, :], scores, mask=wanted)
                if not KEEP_LOGITS:
                    tl.store(logits_ptr + row[:, None] * stride_logits + token[None, :], logits, mask=wanted)
        if KEEP_LOGITS:
            tl.store(logits_ptr + row[:, None] * stride_logits + token[None, :], logits, mask=keep)

        best = tl.max(scores, axis=1)
        best_token = _first(scores == best[:, None], token[None, :])
        best_logit = tl.max(tl.where(token[None, :] == best_token[:, None], logits, _MINUS_INFINITY), axis=1)
        at = row * chunks + chunk
        plane = rows.to(tl.int64) * chunks
        tl.store(partial_ptr + at, largest, mask=inside)
        tl.store(partial_ptr + plane + at, total, mask=inside)
        tl.store(partial_ptr + 2 * plane + at, best, mask=inside)
        tl.store(partial_ptr + 3 * plane + at, best_logit, mask=inside)
        tl.store(best_token_ptr + at, best_token, mask=inside)


@triton.jit
def _score(logits_row, token, mask, temperature):
    """logits / temperature, NaN and what the mask leaves out as -inf."""
    logit = tl.load(logits_row + token, mask=mask, other=_MINUS_INFINITY)
    return tl.div_rn(_without_nan(logit), temperature)


@triton.jit
def _ordered(x):
    """Integers in the order of the floats x, as int64."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _kth_maximum(maxima, k, largest, searching):
    """The k-th largest of the chunks' maxima [R, chunks] of the rows `searching`, by bisection over the floats in their
    order; -inf where there are fewer. At least k logits reach it, and it is one of them."""
    found = tl.full(largest.shape, _MINUS_INFINITY, tl.float32)
    low, high = _ordered(found), _ordered(largest)
    while tl.max((searching & (low < high)).to(tl.int32), axis=0) > 0:
        middle = low + (high - low + 1) // 2
        reaches = _ordered(maxima) >= middle[:, None]
        enough = tl.sum(reaches.to(tl.int32), axis=1).to(tl.int64) >= k
        least = tl.minimum(largest, tl.min(tl.where(reaches, maxima, _INFINITY), axis=1))
        found = tl.where(enough, least, found)
        low, high = tl.where(enough, _ordered(least), low), tl.where(enough, high, middle - 1)
    return found


@triton.jit
def _kth_largest(logits_row, V, k, found, largest, searching, BLOCK: tl.constexpr):
    """The k-th largest logit of the rows `searching`, by bisection over the floats in their order, one pass a step.
    `found`: -inf, or a logit that at least k reach."""
    low, high = _ordered(found), _ordered(largest)
    while tl.max((searching & (low < high)).to(tl.int32), axis=0) > 0:
        middle = low + (high - low + 1) // 2
        counts = tl.zeros([largest.shape[0], BLOCK], tl.int32)
        leasts = tl.full([largest.shape[0], BLOCK], _INFINITY, tl.float32)
        for start in range(0, V, BLOCK):
            token = start + tl.arange(0, BLOCK)[None, :]
            mask = searching[:, None] & (token < V)
            logit = _without_nan(tl.load(logits_row + token, mask=mask, other=_MINUS_INFINITY))
            reaches = (_ordered(logit) >= middle[:, None]) & (token < V)
            counts += reaches.to(tl.int32)
            leasts = tl.minimum(leasts, tl.where(reaches, logit, _INFINITY))
        count = tl.sum(counts, axis=1).to(tl.int64)
        least = tl.minimum(largest, tl.min(leasts, axis=1))
        enough = count >= k
        found = tl.where(enough, least, found)
        low = tl.where(enough, _ordered(least), low)
        high = tl.where(count == k, low, tl.where(enough, high, middle - 1))
    return found


@triton.jit(do_not_specialize=["rows", "V", "chunks", "stride_logits"])
def choose_kernel(
    partial_ptr, best_token_ptr, token_ptr, logprob_ptr, confidence_ptr, logits_ptr, perturbed_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    rows, V, chunks, stride_logits,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """CHUNKS: `chunks` rounded up to a power of two."""
    follow_previous_kernels(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    chunk = tl.arange(0, CHUNKS)[None, :]
    present = inside[:, None] & (chunk < chunks)
    at = row[:, None] * chunks + chunk
    plane = rows.to(tl.int64) * chunks
    maxima = tl.load(partial_ptr + at, mask=present, other=_MINUS_INFINITY)
    largest = tl.max(maxima, axis=1)
    base = _finite(largest)
    totals = tl.load(partial_ptr + plane + at, mask=present, other=0.0)
    total = _tree_sum(tl.where(totals != 0, totals * tl.exp(_finite(maxima) - base[:, None]), 0.0))
    best = tl.load(partial_ptr + 2 * plane + at, mask=present, other=_MINUS_INFINITY)
    best_token = tl.load(best_token_ptr + at, mask=present, other=_NONE)
    token = _first(best == tl.max(best, axis=1)[:, None], best_token)
    mine = best_token == token[:, None]
    logit = tl.load(partial_ptr + 3 * plane + at, mask=present & mine, other=_MINUS_INFINITY)
    logit = tl.max(logit, axis=1)

    if HAS_TOP_K or HAS_TOP_P or HAS_MIN_P:
        temperature, k, p, min_p, filtered = _filter_settings(
            row, inside, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, HAS_TOP_K, HAS_TOP_P, HAS_MIN_P
        )
        divisor = tl.where(filtered, temperature, 1.0)
        logits_row, perturbed_row = logits_ptr + (row * stride_logits)[:, None], perturbed_ptr + (row * V)[:, None]
        top = tl.div_rn(largest, divisor)
        score = tl.div_rn(_without_nan(logit), divisor)
        asking = filtered & (score < top)
        mass = tl.zeros_like(top)  # of what top-k keeps, where top-p needs it
        if HAS_TOP_P:
            weighed = asking & (p < 1)
            threshold = tl.full(top.shape, _MINUS_INFINITY, tl.float32)
            if HAS_TOP_K:
                found = _kth_maximum(maxima, k, largest, weighed & (k < V))
                kth = _kth_largest(logits_row, V, k, found, largest, weighed & (k < V), BLOCK)
                threshold = tl.div_rn(kth, divisor)
            if tl.max(weighed.to(tl.int32), axis=0) > 0:
                masses = tl.zeros([ROWS, BLOCK], tl.float32)
                for start in range(0, V, BLOCK):
                    other = start + tl.arange(0, BLOCK)[None, :]
                    scores = _score(logits_row, other, weighed[:, None] & (other < V), divisor[:, None])
                    weights = tl.where(scores >= threshold[:, None], tl.exp(scores - top[:, None]), 0.0)
                    masses += weights
                mass = _tree_sum(masses)
        while tl.max(asking.to(tl.int32), axis=0) > 0:
            counts, aboves = tl.zeros([ROWS, BLOCK], tl.int32), tl.zeros([ROWS, BLOCK], tl.float32)
            bests, tokens = tl.full([ROWS, BLOCK], _MINUS_INFINITY, tl.float32), tl.full([ROWS, BLOCK], _NONE, tl.int32)
            for start in range(0, V, BLOCK):
                other = start + tl.arange(0, BLOCK)[None, :]
                mask = asking[:, None] & (other < V)
                scores = _score(logits_row, other, mask, divisor[:, None])
                higher = scores > score[:, None]
                counts += higher.to(tl.int32)
                aboves += tl.where(higher, tl.exp(scores - top[:, None]), 0.0)
                noisy = tl.load(perturbed_row + other, mask=mask & higher, other=_MINUS_INFINITY)
                tokens = tl.where(noisy > bests, other, tokens)
                bests = tl.maximum(bests, noisy)
            count, above = tl.sum(counts, axis=1).to(tl.int64), _tree_sum(aboves)
            next_token = _first(bests == tl.max(bests, axis=1)[:, None], tokens)
            kept = (count < k) & ((above < p * mass) | (p >= 1)) & (tl.exp(score - top) >= min_p)
            token = tl.where(asking & ~kept, next_token, token)
            asking = asking & ~kept
            logit = tl.where(asking, tl.load(logits_ptr + row * stride_logits + token, mask=asking, other=0.0), logit)
            score = tl.div_rn(logit, divisor)
            asking = asking & (score < top)

    tl.store(token_ptr + row, token.to(tl.int64), mask=inside)
    tl.store(logprob_ptr + row, logit - base - tl.log(total), mask=inside)
    tl.store(confidence_ptr + row, tl.exp(largest - base - tl.log(total)), mask=inside)


def exit_head(
    hidden: Tensor,
    norm_weight: Tensor,
    lm_head: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    penalty: RepetitionPenalty | None = None,
    sampling: Sampling | None = None,
    logits_out: Tensor | None = None,
    out: ExitHead | None = None,
) -> ExitHead:
    """See layerskip_kernels.ops.exit_head."""
    rows, width = hidden.shape
    vocab = lm_head.shape[0]
    new = hidden.new_empty
    if out is None:
        floats = (new(rows, dtype=torch.float32) for _ in range(2))
        out = ExitHead(new(rows, dtype=torch.int64), *floats)
    settings = sampling or Sampling(*(None,) * 7)
    factor, first_seen, window = penalty or (None,) * 3
    check(hidden=hidden, lm_head=lm_head, bias=bias, logits_out=logits_out, **out._asdict())
    check(
        **{f"sampling.{name}": value for name, value in settings._asdict().items()},
        **{"penalty.factor": factor, "penalty.first_seen": first_seen, "penalty.position": window},
    )
    if not rows:
        return out
    x = rms_norm(hidden, norm_weight, eps)
    unit = stride_unit(x, lm_head)
    tiles = row_tiles(rows, unit)
    config = tuned(
        "exit_head", hidden, tile_config(vocab, width, hidden.dtype, num_sms(hidden), tiles), C=width, N=vocab
    )
    chunks = triton.cdiv(vocab, config["BLOCK_N"])
    has = dict(
        HAS_TOP_K=settings.top_k is not None, HAS_TOP_P=settings.top_p is not None, HAS_MIN_P=settings.min_p is not None
    )
    # From torch's caching allocator: the same blocks call after call, and a captured graph's own.
    partial = new(4, rows, chunks, dtype=torch.float32)
    best_token = new(rows, chunks, dtype=torch.int32)
    logits, perturbed = logits_out, None
    if any(has.values()):
        perturbed = new(rows, vocab, dtype=torch.float32)
        logits = torch.empty_like(perturbed) if logits is None else logits
    stride_logits = 0 if logits is None else logits.stride(0)
    how = round_options(x)
    with guard(hidden):
        exit_head_kernel[(triton.cdiv(rows, ROWS * tiles), chunks)](
            x, lm_head, bias, partial, best_token, logits, perturbed, factor, first_seen, window,
            settings.temperature, settings.seed, settings.position, settings.stream,
            settings.top_k, settings.top_p, settings.min_p,
            rows, vocab, chunks, x.stride(0) // unit, lm_head.stride(0) // unit, stride_logits,
            0 if penalty is None else first_seen.stride(0), 1 if penalty is None else penalty.share(rows),
            float(logit_scale), float(softcap or 1.0),
            C=width, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, HAS_PENALTY=penalty is not None,
            SAMPLED=sampling is not None, HAS_STREAM=settings.stream is not None, KEEP_LOGITS=logits_out is not None,
            TILES=tiles, UNIT=unit, **has, **config, **how,
        )  # fmt: skip
        choose_kernel[(triton.cdiv(rows, CHOOSE_ROWS),)](
            partial, best_token, out.token, out.logprob, out.confidence, logits, perturbed,
            settings.temperature, settings.top_k, settings.top_p, settings.min_p,
            rows, vocab, chunks, stride_logits,
            CHUNKS=triton.next_power_of_2(chunks), ROWS=CHOOSE_ROWS, BLOCK=CHOOSE_BLOCK,
            num_warps=16 if any(has.values()) else 4, **has, **how,
        )  # fmt: skip
    return out
