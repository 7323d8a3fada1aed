import torch


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
    """(loss, exit_losses, gradient of the hiddens [exits, N, C] or None, gradient of lm_head [V, C] or None)."""
    dtype = torch.float64 if lm_head.dtype == torch.float64 else torch.float32
    counted = targets != ignore_index
    items = (counted.sum() if num_items is None else num_items).to(dtype)
    share = counted.to(dtype) / torch.where(items == 0, 1, items)  # of each token in the mean
    one_hot = torch.nn.functional.one_hot(torch.where(counted, targets, 0), lm_head.shape[0]).to(dtype)

    head = lm_head.to(dtype)
    logits = torch.stack([h.to(dtype) @ head.T * logit_scale for h in hiddens])  # [exits, N, V]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.log_softmax(-1)
    soft = (logits / distill_temperature).log_softmax(-1)
    teacher = soft[-1]

    exit_losses = -((log_probs * one_hot).sum(-1) * share).sum(-1)
    divergences = ((teacher.exp() * (teacher - soft)).sum(-1) * share).sum(-1) * distill_temperature**2
    weights = torch.tensor(weights, dtype=dtype, device=lm_head.device)
    loss = (weights * (exit_losses + distill_weight * divergences)).sum()

    # d CE / d z = p - one_hot;  d τ² KL / d z = τ (p_τ - teacher), which is 0 at the last exit, the teacher itself
    grad = log_probs.exp() - one_hot + distill_weight * distill_temperature * (soft.exp() - teacher.exp())
    grad = grad * share[:, None] * weights[:, None, None] * logit_scale
    if softcap is not None:
        grad = grad * (1 - (logits / softcap) ** 2)
    return (
        loss,
        exit_losses,
        (grad @ head).to(lm_head.dtype) if hidden_grads else None,
        sum(g.T @ h.to(dtype) for g, h in zip(grad, hiddens)).to(lm_head.dtype) if head_grad else None,
    )
