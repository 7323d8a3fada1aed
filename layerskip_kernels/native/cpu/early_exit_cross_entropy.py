from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of logits
SLAB_ROWS = 8192  # rows of a half-precision head that exist in float32 at once


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
    """See layerskip_kernels.reference.early_exit_cross_entropy; chunks of tokens, all exits of a chunk together."""
    exits, (vocab, width) = len(hiddens), lm_head.shape
    dtype = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
    rows = (targets != ignore_index).nonzero()[:, 0]
    items = max(len(rows), 1) if num_items is None else float(num_items) or 1.0
    scale = torch.tensor(weights, dtype=dtype)[:, None, None] / items
    losses, divergences = torch.zeros(2, exits, dtype=dtype)
    all_hidden_grads = lm_head.new_zeros(exits, *hiddens[0].shape) if hidden_grads else None
    all_head_grad = torch.zeros(vocab, width, dtype=dtype) if head_grad else None

    tokens = max(1, (chunk_size or CHUNK_BYTES // (vocab * dtype.itemsize)) // exits)
    for index in rows.split(tokens):
        hidden = torch.cat([h.index_select(0, index) for h in hiddens]).to(dtype)
        logits = hidden.new_empty(len(hidden), vocab)
        for slab in _slabs(lm_head, dtype):
            torch.mm(hidden, lm_head[slab].to(dtype).T, out=logits[:, slab])
        logits = logits.view(exits, len(index), vocab)
        slope = _cap(logits, logit_scale, softcap)
        soft = _soft(logits, distill_temperature, divergences) if distill_weight else None

        label = targets.index_select(0, index).expand(exits, -1)[..., None]
        at_label = logits.gather(-1, label)
        log_sum = logits.logsumexp(-1, keepdim=True)
        losses += (log_sum - at_label).sum((1, 2))
        if not (hidden_grads or head_grad):
            continue
        grad = logits.sub_(log_sum).exp_()
        grad.scatter_add_(-1, label, torch.full_like(at_label, -1))
        if soft is not None:
            grad.add_(soft, alpha=distill_weight * distill_temperature)
        grad.mul_(scale * logit_scale)
        if slope is not None:
            grad.mul_(slope)
        grad = grad.view(len(hidden), vocab)

        if hidden_grads:
            total = torch.zeros_like(hidden)
            for slab in _slabs(lm_head, dtype):
                total.addmm_(grad[:, slab], lm_head[slab].to(dtype))
            all_hidden_grads.index_copy_(1, index, total.view(exits, len(index), width).to(lm_head.dtype))
        if head_grad:
            all_head_grad.addmm_(grad.T, hidden)

    exit_losses = losses / items
    loss = (scale[:, 0, 0] * (losses + distill_weight * distill_temperature**2 * divergences)).sum()
    return loss, exit_losses, all_hidden_grads, None if all_head_grad is None else all_head_grad.to(lm_head.dtype)


def _slabs(lm_head: Tensor, dtype: torch.dtype) -> list[slice]:
    """Ranges of vocabulary: all of it, or parts where the head has to be converted."""
    step = lm_head.shape[0] if lm_head.dtype == dtype else SLAB_ROWS
    return [slice(start, min(start + step, lm_head.shape[0])) for start in range(0, lm_head.shape[0], step)]


def _cap(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor | None:
    """Scales and caps in place; returns the derivative of the cap."""
    if softcap is None:
        if logit_scale != 1:
            logits.mul_(logit_scale)
        return None
    logits.mul_(logit_scale / softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


def _soft(logits: Tensor, temperature: float, divergences: Tensor) -> Tensor:
    """Adds the divergences of the chunk; returns softmax(logits / temperature) minus the last exit's."""
    soft = (logits / temperature).log_softmax(-1)
    teacher_log = soft[-1].clone()
    teacher = teacher_log.exp()
    for exit, student in enumerate(soft):
        divergences[exit] += (teacher * (teacher_log - student)).sum()
    return soft.exp_().sub_(teacher)
