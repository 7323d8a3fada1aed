from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.registry import resolve

_DTYPES = (*_check.FLOATS, torch.float64)


class EarlyExitLoss(NamedTuple):
    loss: torch.Tensor  # [] float32 (float64 for float64 inputs): what to call backward() on
    exit_losses: torch.Tensor  # [exits], dtype of loss: cross entropy of each exit, without weights; not differentiable


def early_exit_cross_entropy(
    hiddens: Sequence[torch.Tensor],
    lm_head: torch.Tensor,
    targets: torch.Tensor,
    weights: Sequence[float],
    *,
    ignore_index: int = -100,
    num_items: float | torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    distill_weight: float = 0.0,
    distill_temperature: float = 1.0,
    chunk_size: int | None = None,
) -> EarlyExitLoss:
    """Weighted sum of the cross entropies of several exits through one LM head (LayerSkip, arXiv 2404.16710, eq. 2).

    ``z[i] = softcap · tanh(logit_scale · (hiddens[i] @ lm_headᵀ) / softcap)`` in float32;
    ``loss = Σ_i weights[i] · (CE(z[i], targets) + distill_weight · τ² · KL(softmax(z[-1] / τ) ‖ softmax(z[i] / τ)))``
    with ``τ = distill_temperature``. Cross entropy and divergence are sums over the counted targets divided by
    `num_items`. The last exit teaches: no gradient reaches it through the divergence.

    Gradients are computed together with the loss; the compiled backends walk over chunks of tokens, so the [N, V]
    logits of the exits never exist at once, forward or backward. One backward pass, no second derivatives.

    Args:
        hiddens: one [N, C] per exit, after the final norm; float32, float16, bfloat16 or float64. The deepest is last.
        lm_head: [V, C], dtype of hiddens.
        targets: [N] int64, in 0..V-1 or ignore_index (not checked on GPUs).
        weights: one number per exit, >= 0.
        ignore_index: targets that don't count.
        num_items: divisor of the sums, > 0; a number or a tensor of one element, for losses summed over several calls.
            None: the number of counted targets.
        logit_scale, softcap: see above, both > 0; softcap=None: no cap.
        distill_weight: >= 0; 0: no distillation.
        distill_temperature: > 0.
        chunk_size: rows of logits [chunk_size, V] to hold at once, all exits together; None: about 64 MiB of them,
            512 MiB on a GPU. At least one token of every exit is held. `reference` holds everything whatever it is.

    Returns:
        `EarlyExitLoss` (loss, exit_losses). Both are 0 where no target counts.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range.
    """
    if not isinstance(hiddens, (list, tuple)):
        raise TypeError(f"hiddens: expected a list of tensors, got {type(hiddens).__name__}")
    if not hiddens:
        raise ValueError("hiddens: no exit given, expected at least one tensor")
    first = _check.tensor("hiddens[0]", hiddens[0], (None, None), dtype=_DTYPES)
    for i, hidden in enumerate(hiddens[1:], 1):
        _check.tensor(f"hiddens[{i}]", hidden, tuple(first.shape), dtype=first.dtype, like=first)
    _check.tensor("lm_head", lm_head, (None, first.shape[1]), dtype=first.dtype, like=first)
    vocab = lm_head.shape[0]
    if not vocab:
        raise ValueError("lm_head: an empty vocabulary, expected at least one row")
    _check.tensor("targets", targets, (first.shape[0],), dtype=torch.int64, like=first)
    weights = [float(w) for w in weights]
    if len(weights) != len(hiddens):
        raise ValueError(f"weights: {len(weights)} of them for {len(hiddens)} hiddens, expected one each")
    for i, weight in enumerate(weights):
        _not_negative(f"weights[{i}]", weight)
    _check.positive("logit_scale", logit_scale)
    if softcap is not None:
        _check.positive("softcap", softcap)
    _not_negative("distill_weight", distill_weight)
    _check.positive("distill_temperature", distill_temperature)
    if chunk_size is not None:
        _check.positive("chunk_size", chunk_size)
    if isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: shape {list(num_items.shape)}, expected one element")
        num_items = num_items.detach().reshape(()).to(first.device)
    elif num_items is not None:
        _check.positive("num_items", num_items)
        num_items = torch.full((), float(num_items), dtype=torch.float64, device=first.device)

    grad = torch.is_grad_enabled()
    hidden_grads = grad and any(h.requires_grad for h in hiddens)
    head_grad = grad and lm_head.requires_grad
    options = (
        *(weights, ignore_index, num_items, float(logit_scale), softcap, float(distill_weight)),
        *(float(distill_temperature), chunk_size, hidden_grads, head_grad),
    )
    if torch.compiler.is_compiling():
        traced = torch.ops.layerskip_kernels.early_exit_cross_entropy(list(hiddens), lm_head, targets, *options)
        return EarlyExitLoss(traced[0], traced[1].detach())
    if targets.device.type == "cpu":
        _check_targets(targets, ignore_index, vocab)
    if hidden_grads or head_grad:
        return EarlyExitLoss(*_Function.apply(targets, options, lm_head, *hiddens))
    return EarlyExitLoss(*_run(hiddens, lm_head, targets, *options)[:2])


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}={value}: must be >= 0")


def _check_targets(targets, ignore_index, vocab):
    wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{index}]={int(targets[index])}: choose 0..{vocab - 1} or ignore_index={ignore_index}"
        )


def _run(
    hiddens,
    lm_head,
    targets,
    weights,
    ignore_index,
    num_items,
    logit_scale,
    softcap,
    distill_weight,
    distill_temperature,
    chunk_size,
    hidden_grads,
    head_grad,
):
    """The backend's (loss, exit_losses, gradient of the hiddens [exits, N, C] or None, of lm_head [V, C] or None)."""
    implementation = resolve("early_exit_cross_entropy", lm_head.device, lm_head.dtype)
    # Precision is the op's own choice, also inside autocast.
    with torch.no_grad(), torch.autocast(lm_head.device.type, enabled=False):
        return implementation(
            hiddens,
            lm_head,
            targets,
            weights,
            ignore_index=ignore_index,
            num_items=num_items,
            logit_scale=logit_scale,
            softcap=softcap,
            distill_weight=distill_weight,
            distill_temperature=distill_temperature,
            chunk_size=chunk_size,
            hidden_grads=hidden_grads,
            head_grad=head_grad,
        )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets, options, lm_head, *hiddens):
        loss, exit_losses, hidden_grads, head_grad = _run(hiddens, lm_head, targets, *options)
        ctx.save_for_backward(hidden_grads, head_grad)
        ctx.mark_non_differentiable(exit_losses)
        ctx.exits = len(hiddens)
        return loss, exit_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden_grads, head_grad = ctx.saved_tensors
        hiddens = [None] * ctx.exits if hidden_grads is None else (hidden_grads * grad.to(hidden_grads.dtype)).unbind()
        return None, None, None if head_grad is None else head_grad * grad.to(head_grad.dtype), *hiddens


def _kernel(hiddens, lm_head, targets, *options):
    loss, exit_losses, hidden_grads, head_grad = _run(hiddens, lm_head, targets, *options)
    nothing = lm_head.new_empty(0)
    return (
        loss,
        exit_losses,
        nothing if hidden_grads is None else hidden_grads,
        nothing.clone() if head_grad is None else head_grad,
    )


def _fake(hiddens, lm_head, targets, *options):
    hidden_grads, head_grad = options[-2:]
    dtype = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
    return (
        lm_head.new_empty((), dtype=dtype),
        lm_head.new_empty(len(hiddens), dtype=dtype),
        lm_head.new_empty(len(hiddens), *hiddens[0].shape) if hidden_grads else lm_head.new_empty(0),
        lm_head.new_empty(lm_head.shape) if head_grad else lm_head.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.exits, (ctx.hidden_grads, ctx.head_grad) = len(inputs[0]), inputs[-2:]


def _backward(ctx, grad, *_):
    hidden_grads, head_grad = ctx.saved_tensors
    hiddens = (hidden_grads * grad.to(hidden_grads.dtype)).unbind() if ctx.hidden_grads else [None] * ctx.exits
    return list(hiddens), head_grad * grad.to(head_grad.dtype) if ctx.head_grad else None, *[None] * 11


_library.register(
    "early_exit_cross_entropy(Tensor[] hiddens, Tensor lm_head, Tensor targets, float[] weights, int ignore_index, "
    "Tensor? num_items, float logit_scale, float? softcap, float distill_weight, float distill_temperature, "
    "int? chunk_size, bool hidden_grads, bool head_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    autograd=(_setup_context, _backward),
)
