import pytest
import torch

from layerskip_kernels import reference
from layerskip_kernels.ops import Verified, verify_tokens

TORCH = False  # it has no such operation


@pytest.mark.parametrize("batch", [1, 8, 64])
def bench_verify_tokens(row, backend, device, batch):
    drafts = 6
    draft, target = (torch.randint(0, 2, (batch, n), device=device) for n in (drafts, drafts + 1))
    num_draft, remaining = (torch.full((batch,), n, dtype=torch.int32, device=device) for n in (drafts, 100))
    finished, eos_ids = torch.zeros(batch, dtype=torch.bool, device=device), torch.tensor([7], device=device)
    arguments = dict(eos_ids=eos_ids, remaining=remaining, finished=finished)
    expected = reference.verify_tokens(draft, target, num_draft, **arguments)
    out = Verified(*(torch.empty_like(t) for t in expected))
    verify_tokens(draft, target, num_draft, **arguments, out=out)
    assert all(torch.equal(a, e) for a, e in zip(out, expected))
    row(
        [lambda: verify_tokens(draft, target, num_draft, **arguments, out=out)],
        8 * (draft.numel() + 2 * target.numel()),
        device,
    )
