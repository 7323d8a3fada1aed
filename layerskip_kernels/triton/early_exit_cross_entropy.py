"""The exits' cross entropy with its gradients, over chunks of tokens: torch's products, two kernels in between.

The [N, V] logits of all exits never exist at once. A chunk holds the float32 logits of a few tokens of every exit.
`early_exit_loss_kernel`, grid (row), walks over a row of logits once, with a running maximum, for the row's loss, its
divergence from the last exit and the logarithms of its sums. `early_exit_gradient_kernel`, grid (row, block of V),
turns logits into gradients: in place where they keep the dtype, else into a buffer of the head's dtype, the operand of
the two products behind. The students' rows go first, because they read the last exit's logits.

A row's sums run over blocks of V in ascending order, each block by one compiled reduction.

Roofline of both kernels (bytes: logits read twice, gradients written once; H100 at 3.35 TB/s; expected, not measured),
512 rows of a chunk, bf16:
- V = 128256: 263 MB, twice, + 131 MB: 0.20 ms (the three products at C = 4096: 1.6 TFLOP, 1.6 ms at 989 TFLOP/s);
- V = 32000: 66 MB, twice, + 33 MB: 0.05 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerskip_kernels.triton import launch

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of logits; too few rows would leave a GPU's products idle
SLAB_ROWS = 8192  # rows of a half-precision head converted at once where products can't widen by themselves
# Before torch 2.10 the matrix that a product is added to has to be of the operands' dtype (pytorch PR 167931).
_ADDS_WIDENED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
BLOCK = 4096
ROWS = 64 if launch.INTERPRETED else 1  # of a program: the interpreter pays per program


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    # Below, 1 - e cancels.
    square = x * x
    small = x * (1 - square * (1.0 / 3 - square * (2.0 / 15)))
    return tl.where(tl.abs(x) < 0.03, small, tl.where(x < 0, -t, t))


@triton.jit
def _capped(z, logit_scale, softcap, CAPPED: tl.constexpr):
    z = z * logit_scale
    if CAPPED:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit(do_not_specialize=["rows", "tokens", "vocab", "stride", "teacher_row"])
def early_exit_loss_kernel(
    logits_ptr, labels_ptr, losses_ptr, divergences_ptr, log_sums_ptr, rows, tokens, vocab, stride, teacher_row,
    logit_scale, softcap, temperature, CAPPED: tl.constexpr, DISTILL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """log_sums[row]: of exp(z), of exp(z / temperature), of the last exit's exp(z / temperature)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real, token = row < rows, row % tokens
    own_ptr = logits_ptr + row[:, None].to(tl.int64) * stride
    teacher_ptr = logits_ptr + (teacher_row + token)[:, None].to(tl.int64) * stride
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    maximum = tl.full([ROWS], float("-inf"), dtype)
    student_maximum, teacher_maximum = maximum, maximum
    total = tl.zeros([ROWS], dtype)
    student_total, teacher_total, cross = total, total, total
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (column < vocab) & real[:, None]
        z = _capped(tl.load(own_ptr + column, mask=inside, other=0.0), logit_scale, softcap, CAPPED)
        z = tl.where(column < vocab, z, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(z - new_maximum[:, None]), axis=1)
        maximum = new_maximum
        if DISTILL:
            student = z / temperature
            new_maximum = tl.maximum(student_maximum, tl.max(student, axis=1))
            student_total = student_total * tl.exp(student_maximum - new_maximum)
            student_total += tl.sum(tl.exp(student - new_maximum[:, None]), axis=1)
            student_maximum = new_maximum

            teacher = tl.load(teacher_ptr + column, mask=inside, other=0.0)
            teacher = _capped(teacher, logit_scale, softcap, CAPPED) / temperature
            teacher = tl.where(column < vocab, teacher, float("-inf"))
            new_maximum = tl.maximum(teacher_maximum, tl.max(teacher, axis=1))
            rescale = tl.exp(teacher_maximum - new_maximum)
            p = tl.exp(teacher - new_maximum[:, None])
            teacher_total = teacher_total * rescale + tl.sum(p, axis=1)
            cross = cross * rescale + tl.sum(tl.where(column < vocab, p * (teacher - student), 0.0), axis=1)
            teacher_maximum = new_maximum

    label = tl.load(labels_ptr + token, mask=real, other=0)
    at_label = tl.load(logits_ptr + row.to(tl.int64) * stride + label, mask=real, other=0.0)
    log_sum = maximum + tl.log(total)
    tl.store(losses_ptr + row, log_sum - _capped(at_label, logit_scale, softcap, CAPPED), mask=real)
    tl.store(log_sums_ptr + row * 3, log_sum, mask=real)
    if DISTILL:
        student_sum = student_maximum + tl.log(student_total)
        teacher_sum = teacher_maximum + tl.log(teacher_total)
        tl.store(divergences_ptr + row, cross / teacher_total - teacher_sum + student_sum, mask=real)
        tl.store(log_sums_ptr + row * 3 + 1, student_sum, mask=real)
        tl.store(log_sums_ptr + row * 3 + 2, teacher_sum, mask=real)


@triton.jit(do_not_specialize=["first_row", "rows", "tokens", "vocab", "stride", "teacher_row"])
def early_exit_gradient_kernel(
    logits_ptr, gradient_ptr, labels_ptr, weights_ptr, log_sums_ptr, first_row, rows, tokens, vocab, stride,
    teacher_row, logit_scale, softcap, temperature, distill_weight, CAPPED: tl.constexpr, DISTILL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows [first_row, rows): weights[exit] x the derivative of a token's loss by logit_scale x its logits."""
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real, token = row < rows, row % tokens
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (column < vocab) & real[:, None]
    offset = row[:, None].to(tl.int64) * stride + column
    z = _capped(tl.load(logits_ptr + offset, mask=inside, other=0.0), logit_scale, softcap, CAPPED)
    gradient = tl.exp(z - tl.load(log_sums_ptr + row * 3, mask=real, other=0.0)[:, None])
    gradient -= tl.where(column == tl.load(labels_ptr + token, mask=real, other=0)[:, None], 1.0, 0.0)
    if DISTILL:
        teacher_offset = (teacher_row + token)[:, None].to(tl.int64) * stride + column
        teacher = tl.load(logits_ptr + teacher_offset, mask=inside, other=0.0)
        teacher = _capped(teacher, logit_scale, softcap, CAPPED)
        p = tl.exp(z / temperature - tl.load(log_sums_ptr + row * 3 + 1, mask=real, other=0.0)[:, None])
        q = tl.exp(teacher / temperature - tl.load(log_sums_ptr + row * 3 + 2, mask=real, other=0.0)[:, None])
        gradient += distill_weight * temperature * (p - q)
    gradient *= tl.load(weights_ptr + row // tokens, mask=real, other=0.0)[:, None]
    if CAPPED:
        gradient *= 1 - (z / softcap) * (z / softcap)
    tl.store(gradient_ptr + offset, launch.cast(gradient, gradient_ptr.dtype.element_ty), mask=inside)


def early_exit_cross_entropy(
    hiddens,
    lm_head,
    targets,
    weights,
    *,
    ignore_index=-100,
    num_items=None,
    logit_scale=1.0,
    softcap=None,
    distill_weight=0.0,
    distill_temperature=1.0,
    chunk_size=None,
    hidden_grads=False,
    head_grad=False,
):
    """See layerskip_kernels.reference.early_exit_cross_entropy. Waits for the device once, to count the targets."""
    launch.check(lm_head=lm_head, targets=targets, **{f"hiddens[{i}]": h for i, h in enumerate(hiddens)})
    exits, (vocab, width) = len(hiddens), lm_head.shape
    dtype = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
    grad_dtype = lm_head.dtype if _widening(lm_head) else dtype
    rows = (targets != ignore_index).nonzero()[:, 0]
    items = max(len(rows), 1) if num_items is None else torch.where(num_items == 0, 1, num_items).to(dtype)
    weights = torch.tensor(weights, dtype=dtype).to(lm_head.device, non_blocking=True)
    losses, divergences = lm_head.new_zeros(2, exits, dtype=dtype)
    all_hidden_grads = lm_head.new_zeros(exits, *hiddens[0].shape) if hidden_grads else None
    all_head_grad = lm_head.new_zeros(vocab, width, dtype=dtype) if head_grad else None

    limit = CHUNK_BYTES[lm_head.device.type] // (vocab * dtype.itemsize)
    tokens = min(max(1, (chunk_size or limit) // exits), max(1, len(rows)))
    all_logits = lm_head.new_empty(exits * tokens, vocab, dtype=dtype)
    same = grad_dtype == dtype
    all_gradients = all_logits if same or not (hidden_grads or head_grad) else lm_head.new_empty(all_logits.shape)
    per_row = lm_head.new_empty(5, exits * tokens, dtype=dtype)
    options = (logit_scale, softcap or 1.0, distill_temperature)
    variant = dict(CAPPED=softcap is not None, DISTILL=distill_weight > 0, ROWS=ROWS, BLOCK=BLOCK, num_warps=8)
    variant |= launch.EXACT

    for index in rows.split(tokens) if len(rows) else ():
        count, taken = len(index), exits * len(index)
        hidden = torch.cat([h.index_select(0, index) for h in hiddens])
        labels = targets.index_select(0, index)
        logits, gradient = all_logits[:taken], all_gradients[:taken]
        shape = (count, vocab, vocab, taken - count)  # tokens, V, row stride, the last exit's first row
        _products(hidden, lm_head, logits)
        with launch.guard(lm_head):
            early_exit_loss_kernel[(triton.cdiv(taken, ROWS),)](
                logits, labels, per_row[0], per_row[1], per_row[2:], taken, *shape, *options, **variant
            )
            losses += per_row[0, :taken].view(exits, count).sum(1)
            if distill_weight:
                divergences += per_row[1, :taken].view(exits, count).sum(1)
            if not (hidden_grads or head_grad):
                continue
            for first_row, end in ((0, taken - count), (taken - count, taken)):
                if first_row < end:
                    early_exit_gradient_kernel[(triton.cdiv(end - first_row, ROWS), triton.cdiv(vocab, BLOCK))](
                        logits, gradient, labels, weights, per_row[2:], first_row, end, *shape, *options,
                        distill_weight, **variant,
                    )  # fmt: skip
        if hidden_grads:
            total = _times_head(gradient, lm_head, dtype).mul_(logit_scale / items)
            all_hidden_grads.index_copy_(1, index, total.view(exits, count, width).to(lm_head.dtype))
        if head_grad:
            _add_outer(all_head_grad, gradient, hidden)

    exit_losses = losses / items
    loss = (weights * (losses + distill_weight * distill_temperature**2 * divergences)).sum() / items
    if head_grad:
        all_head_grad = all_head_grad.mul_(logit_scale / items).to(lm_head.dtype)
    return loss, exit_losses, all_hidden_grads, all_head_grad


def _widening(head: Tensor) -> bool:
    """Whether torch multiplies matrices of this dtype into float32 here (CUDA, since torch 2.8)."""
    half = head.dtype in (torch.float16, torch.bfloat16)
    return half and head.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")


def _slabs(head: Tensor, dtype: torch.dtype) -> list[slice]:
    return _slices(head.shape[0], head.shape[0] if head.dtype == dtype else SLAB_ROWS)


def _slices(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _products(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """out = hidden @ headᵀ in the dtype of out."""
    if _widening(head):
        torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
        return
    hidden = hidden.to(out.dtype)
    for slab in _slabs(head, out.dtype):
        torch.mm(hidden, head[slab].to(out.dtype).T, out=out[:, slab])


def _times_head(gradient: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    if _widening(head):
        return torch.mm(gradient, head, out_dtype=dtype)
    total = gradient.new_zeros(len(gradient), head.shape[1])
    for slab in _slabs(head, dtype):
        total.addmm_(gradient[:, slab], head[slab].to(dtype))
    return total


def _add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradientᵀ @ hidden."""
    if not _widening(hidden):
        total.addmm_(gradient.T, hidden.to(total.dtype))
    elif _ADDS_WIDENED:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)
    else:
        for slab in _slices(len(total), SLAB_ROWS):
            total[slab] += torch.mm(gradient[:, slab].T, hidden, out_dtype=total.dtype)
