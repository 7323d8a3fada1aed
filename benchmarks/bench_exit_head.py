import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import ExitHead, RepetitionPenalty, Sampling, exit_head, quantize
from layerskip_kernels.reference.exit_head import penalize

SHAPES = {"smollm2": (49152, 576), "llama3.2-1b": (128256, 2048)}
EPS = 1e-5


@pytest.mark.parametrize("draw", ["greedy", "penalized", "sampled", "top_p"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 8])
def bench_exit_head(row, backend, device, rows, shape, draw):
    dtype = torch.bfloat16
    vocab, width = SHAPES[shape]
    hidden = torch.randn(rows, width, dtype=dtype, device=device)
    norm = torch.ones(width, dtype=dtype, device=device)
    size = vocab * width * dtype.itemsize
    heads = rotated(lambda: torch.randn(vocab, width, dtype=dtype, device=device) / width**0.5, size, device)
    index = torch.arange(rows, device=device)
    ones = torch.ones(rows, device=device)
    sampling = Sampling(0.7 * ones, index, index) if draw in ("sampled", "top_p") else None
    if draw == "top_p":
        sampling = sampling._replace(top_p=0.9 * ones)
    penalty = None
    if draw == "penalized":  # one window, 500 tokens before it
        first_seen = torch.full((1, vocab), 255, dtype=torch.uint8, device=device)
        first_seen[0, :: vocab // 500] = 0
        penalty = RepetitionPenalty(1.1 * ones, first_seen, index.to(torch.uint8))
    if backend == "torch":
        row([lambda h=h: _torch_head(hidden, norm, h, draw, penalty) for h in heads], size, device)
        return
    options = dict(eps=EPS, sampling=sampling, penalty=penalty)
    expected = reference.exit_head(hidden, norm, heads[0], **options)
    actual = exit_head(hidden, norm, heads[0], **options)
    assert_close(actual.confidence, expected.confidence, dtype)
    same = actual.token == expected.token
    assert same.sum() >= rows - 1  # the normed state is rounded: one near tie may fall the other way
    assert_close(actual.logprob[same], expected.logprob[same], dtype)
    out = ExitHead(torch.empty_like(index), torch.empty_like(ones), torch.empty_like(ones))
    row([lambda h=h: exit_head(hidden, norm, h, out=out, **options) for h in heads], size, device)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 8])
def bench_quantized_head(row, backend, rows, shape, bits):
    vocab, width = SHAPES[shape]
    hidden, norm = torch.randn(rows, width, dtype=torch.bfloat16), torch.ones(width, dtype=torch.bfloat16)
    head = quantize(torch.randn(vocab, width) / width**0.5, bits)
    heads = rotated(lambda: head._replace(values=head.values.clone(), scale=head.scale.clone()), head.nbytes, "cpu")
    logits = torch.empty(rows, vocab)
    exit_head(hidden, norm, head, eps=EPS, logits_out=logits)
    expected = torch.empty(1, vocab)
    reference.exit_head(hidden[:1], norm, head, eps=EPS, logits_out=expected)
    assert_close(logits[:1], expected, hidden.dtype)
    out = exit_head(hidden, norm, head, eps=EPS)
    row([lambda h=h: exit_head(hidden, norm, h, eps=EPS, out=out) for h in heads], head.nbytes)


def _torch_head(hidden, norm, head, draw, penalty):
    """What a decoder does without such a kernel."""
    logits = F.linear(F.rms_norm(hidden, norm.shape, norm, EPS), head)
    if penalty is not None:
        logits = penalize(logits.float(), penalty)
    if draw in ("greedy", "penalized"):
        return logits.argmax(-1)
    logits = logits.float() / 0.7
    if draw == "sampled":
        return logits.softmax(-1).multinomial(1)
    ordered, token = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    kept = probs.where(probs.cumsum(-1) - probs < 0.9, 0.0)
    return token.gather(1, kept.multinomial(1))
