from functools import partial

import torch

from layerskip_kernels.ops.exit_head import RESCORED, ExitHead
from layerskip_kernels.reference.gumbel import gumbel_noise
from layerskip_kernels.reference.quantized import product
from layerskip_kernels.reference.rms_norm import rms_norm


def exit_head(
    hidden,
    norm_weight,
    lm_head,
    *,
    eps,
    bias=None,
    logit_scale=1.0,
    softcap=None,
    penalty=None,
    sampling=None,
    logits_out=None,
    screen=None,
    out=None,
):
    normed = rms_norm(hidden, norm_weight, eps)
    logits_of = partial(finish, bias=bias, logit_scale=logit_scale, softcap=softcap, penalty=penalty)
    logits = read = logits_of(product(normed, lm_head))
    again = None
    if screen is not None and screen.error is None:  # with an error it changes nothing
        read = logits_of(product(normed, screen.weight))
        again = rescored(read, sampling)
        logits = torch.where(again, logits, read)
    if logits_out is not None:
        logits_out.copy_(logits)

    scores = torch.where(logits.isnan(), float("-inf"), logits)
    if again is not None:
        scores = torch.where(again | filters(sampling, scores.shape), scores, float("-inf"))
    token = lowest_argmax(scores if sampling is None else perturb(scores, sampling))
    log_sum = read.logsumexp(-1)
    result = ExitHead(
        token,
        logits.gather(1, token[:, None])[:, 0] - log_sum,
        torch.exp(read.amax(-1) - log_sum),
    )
    return result if out is None else ExitHead(*(o.copy_(r) for o, r in zip(out, result)))


def finish(logits, *, bias, logit_scale, softcap, penalty):
    """What becomes of the products."""
    if bias is not None:
        logits = logits + bias.float()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if penalty is None else penalize(logits, penalty)


def rescored(logits, sampling):
    """[N, V] bool: the `RESCORED` tokens of largest score, without filters; of largest logit in rows that filter."""
    scores = torch.where(logits.isnan(), float("-inf"), logits)
    if sampling is not None:
        plain = perturb(scores, sampling._replace(top_k=None, top_p=None, min_p=None))
        scores = torch.where(filters(sampling, scores.shape), scores, plain)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :RESCORED]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)


def filters(sampling, shape):
    """[N, 1] bool: rows that drop tokens before they draw."""
    found = torch.zeros(shape[0], 1, dtype=torch.bool)
    if sampling is not None:
        for field, drops in (
            (sampling.top_k, lambda k: (k > 0) & (k < shape[1])),
            (sampling.top_p, lambda p: p < 1),
            (sampling.min_p, lambda p: p > 0),
        ):
            if field is not None:
                found |= drops(field)[:, None]
        found &= sampling.temperature[:, None] != 0
    return found


def penalize(logits, penalty):
    """Logits of seen tokens divided by the row's factor where positive, multiplied by it where negative."""
    factor = penalty.factor[:, None]
    first_seen = penalty.first_seen.repeat_interleave(penalty.share(len(logits)), dim=0)
    seen = first_seen <= penalty.position[:, None]  # 255 is above all
    penalized = torch.where(logits < 0, logits * factor, logits / factor)
    return torch.where(seen, penalized, logits)


def lowest_argmax(scores):
    """Index of the largest score of each row [N, V]; the lowest among equals."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    best = scores.amax(-1, keepdim=True)
    return torch.where(scores == best, index, scores.shape[-1]).amin(-1)


def perturb(scores, sampling):
    """Scores whose arg-max draws from softmax(filtered(scores / temperature)); rows of temperature 0 as they are."""
    return process(scores, sampling) + sampling_noise(sampling, scores.shape[-1])


def process(scores, sampling):
    """Scores divided by temperature, then filtered; rows of temperature 0 as they are."""
    temperature = sampling.temperature[:, None]
    greedy = temperature == 0
    return torch.where(greedy, scores, filter_scores(scores / torch.where(greedy, 1, temperature), sampling))


def sampling_noise(sampling, vocab):
    """Gumbel noise [N, V] of the rows; zero in rows of temperature 0."""
    stream = torch.zeros_like(sampling.seed) if sampling.stream is None else sampling.stream
    noise = gumbel_noise(sampling.seed, stream, sampling.position, vocab)
    return torch.where(sampling.temperature[:, None] == 0, 0, noise)


def filter_scores(scores, sampling):
    """Top-k, then top-p, then min-p, as transformers' warpers define them; what they drop becomes minus infinity.

    Top-k keeps ties of the k-th score. Top-p keeps the smallest set of largest probabilities whose sum reaches p, and
    of equal scores at its edge all of them, so that the set is a threshold and needs no sort.
    """
    minus_infinity = float("-inf")
    if sampling.top_k is not None:
        vocab = scores.shape[-1]
        k = torch.where(sampling.top_k > 0, sampling.top_k, vocab).clamp(max=vocab)[:, None]
        threshold = scores.sort(-1, descending=True).values.gather(1, k - 1)
        scores = torch.where(scores < threshold, minus_infinity, scores)
    if sampling.top_p is not None:
        ordered = scores.sort(-1, descending=True).values
        before = ordered.softmax(-1).double().cumsum(-1) - ordered.softmax(-1)
        kept = before < sampling.top_p[:, None].double()
        kept[:, 0] = True
        threshold = torch.where(kept, ordered, float("inf")).amin(-1, keepdim=True)
        scores = torch.where((scores < threshold) & (sampling.top_p[:, None] < 1), minus_infinity, scores)
    if sampling.min_p is not None:
        probs = scores.softmax(-1)
        scores = torch.where(probs < sampling.min_p[:, None] * probs.amax(-1, keepdim=True), minus_infinity, scores)
    return scores
