import torch

from layerskip_kernels.ops.verify_tokens import Verified


def verify_tokens(draft, target, num_draft, *, eos_ids, remaining, finished, out=None):
    step = torch.arange(draft.shape[1], device=draft.device)
    equal = (draft == target[:, :-1]) & (step < num_draft[:, None])
    accepted = equal.int().cumprod(dim=1).sum(dim=1)
    return emit(target, accepted, eos_ids, remaining, finished, out)


def emit(tokens, accepted, eos_ids, remaining, finished, out):
    """``tokens[:, : accepted + 1]`` cut after the first EOS and at `remaining`; nothing for finished sequences."""
    width = tokens.shape[1]
    step = torch.arange(width, device=tokens.device)
    emitted = torch.minimum(accepted + 1, remaining.clamp(min=0))
    emitted = torch.where(finished, 0, emitted)
    eos = torch.isin(tokens, eos_ids) & (step < emitted[:, None])
    first_eos = torch.where(eos, step, width).amin(dim=1)
    emitted = torch.minimum(emitted, first_eos + 1)
    result = Verified(
        torch.where(step < emitted[:, None], tokens, -1),
        emitted.int(),
        torch.minimum(accepted, emitted).int(),
        finished | eos.any(dim=1) | (emitted >= remaining),
    )
    return result if out is None else Verified(*(o.copy_(r) for o, r in zip(out, result)))
