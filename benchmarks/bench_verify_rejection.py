import pytest
import torch
from conftest import rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import verify_rejection

TORCH = False  # it has no such operation


@pytest.mark.parametrize("method", ["standard", "block"])
@pytest.mark.parametrize("batch", [1, 8])
def bench_verify_rejection(row, backend, device, batch, method):
    drafts, vocab = 6, 32000
    draft = torch.randint(0, vocab, (batch, drafts), device=device)
    num_draft, remaining = (torch.full((batch,), n, dtype=torch.int32, device=device) for n in (drafts, 100))
    finished, eos_ids = torch.zeros(batch, dtype=torch.bool, device=device), torch.tensor([7], device=device)
    rest = dict(method=method, eos_ids=eos_ids, remaining=remaining, finished=finished)
    size = batch * (2 * drafts + 1) * vocab * 4

    def probabilities():
        q = torch.rand(batch, drafts, vocab, device=device).softmax(-1)
        p = torch.cat(
            (q * torch.rand(batch, drafts, 1, device=device) + 1e-6, torch.rand(batch, 1, vocab, device=device)), 1
        )
        return q, p / p.sum(-1, keepdim=True), torch.rand(batch, drafts + 1, 2, device=device)

    inputs = rotated(probabilities, size, device)
    expected = reference.verify_rejection(draft, *inputs[0], num_draft, **rest)
    actual = verify_rejection(draft, *inputs[0], num_draft, **rest)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    row([lambda i=i: verify_rejection(draft, *i, num_draft, **rest) for i in inputs], size, device)
