import torch

from layerskip_kernels.reference.verify_tokens import emit


def verify_rejection(
    draft,
    draft_probs,
    target_probs,
    uniforms,
    num_draft,
    *,
    method="standard",
    eos_ids,
    remaining,
    finished,
    out=None,
):
    accept = {"standard": accept_standard, "block": accept_block}[method]
    tokens = torch.zeros(draft.shape[0], draft.shape[1] + 1, dtype=torch.int64, device=draft.device)
    tokens[:, :-1] = draft
    accepted = torch.zeros_like(num_draft)
    for b in range(draft.shape[0]):
        if finished[b]:
            continue  # its probabilities may hold anything
        n = int(num_draft[b])
        x, q, p, u = draft[b, :n], draft_probs[b, :n].double(), target_probs[b].double(), uniforms[b].double()
        a, weights = accept(x, q, p, u[:, 0])
        if not weights.sum() > 0:
            weights = p[a]  # p = q up to rounding: nothing is left over
        accepted[b] = a
        tokens[b, a] = draw(weights, u[a, 1])
    return emit(tokens, accepted, eos_ids, remaining, finished, out)


def accept_standard(x, q, p, u):
    """Accepted length and the unnormalised distribution of the next token (Leviathan et al., algorithm 1)."""
    for i, token in enumerate(x.tolist()):
        if not u[i] * q[i, token] < p[i, token]:
            return i, (p[i] - q[i]).clamp(min=0)
    return len(x), p[len(x)]


def accept_block(x, q, p, u):
    """The same for block verification (Sun et al., algorithm 2): later drafts can rescue earlier ones."""
    n = len(x)
    accepted, ratio, accepted_ratio = 0, 1.0, 1.0
    for i, token in enumerate(x.tolist(), start=1):
        ratio = min(ratio * float(p[i - 1, token] / q[i - 1, token]), 1.0)
        if i == n:
            threshold = ratio
        else:
            left_over = float((ratio * p[i] - q[i]).clamp(min=0).sum())
            denominator = left_over + 1 - ratio
            threshold = left_over / denominator if denominator > 0 else 1.0
        if u[i - 1] < threshold:
            accepted, accepted_ratio = i, ratio
    if accepted == n:
        return n, p[n]
    return accepted, (accepted_ratio * p[accepted] - q[accepted]).clamp(min=0)


def draw(weights, uniform):
    """First index whose cumulative weight exceeds uniform · total; always one of positive weight."""
    cumulative = weights.cumsum(0)
    index = int((cumulative <= uniform * cumulative[-1]).sum())
    last_positive = int(weights.nonzero()[-1])
    return min(index, last_positive)
