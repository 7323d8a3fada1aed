import pytest
import torch
import torch.nn.functional as F
from op_inputs import (
    FLOATS,
    Guarded,
    Inputs,
    assert_rejects,
    assert_rejects_tensor,
    bad_tensors,
    clone,
    dtype_name,
    num_threads,
    reference,
    same_bits,
    strided,
)
from tolerances import assert_close, tolerance
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from layerskip_kernels.ops import ExitHead, Sampling, exit_head
from layerskip_kernels.reference.exit_head import filter_scores, perturb

OP = "exit_head"
EPS = 1e-5
OPTIONS = {
    "plain": {},
    "scaled": dict(logit_scale=0.125),
    "capped": dict(softcap=3.0),
    "all": dict(logit_scale=0.5, softcap=1.5, bias=True),
    "bias": dict(bias=True),
}


def case(inputs, rows, width, vocab, **options):
    if options.get("bias"):
        options["bias"] = inputs.randn(vocab)
    hidden, weight = inputs.randn(rows, width), inputs.norm(width)
    return dict(hidden=hidden, norm_weight=weight, lm_head=inputs.weight(vocab, width), eps=EPS) | options


def whole_number_case(inputs, rows, width, vocab):
    """Logits that are small whole numbers, exact in every dtype and order of summation, with many ties."""
    hidden = inputs.integers(0, 2, rows, width) * 2 - 1  # mean of squares 1: the norm changes nothing
    weight, lm_head = inputs.integers(1, 3, width), inputs.integers(-1, 2, vocab, width)
    exact = (hidden.double() * weight.double()) @ lm_head.double().T
    return dict(hidden=hidden, norm_weight=weight, lm_head=lm_head, eps=1e-12), exact.cpu()


def lowest_argmax(scores):
    return torch.tensor([row.index(max(row)) for row in scores.tolist()])


def draws(inputs, rows, *, temperature=1.0, seed=0, stream=None, position=None, top_k=None, top_p=None, min_p=None):
    """`Sampling` with one draw per row, at positions 0, 1, 2, …; numbers are repeated for every row."""

    def column(value, dtype):
        if value is None:
            return None
        return torch.as_tensor(value, dtype=dtype, device=inputs.device).expand(rows).contiguous()

    position = torch.arange(rows) if position is None else position
    integers = (column(v, torch.int64) for v in (seed, position, stream, top_k))
    seed, position, stream, top_k = integers
    top_p, min_p = column(top_p, torch.float32), column(min_p, torch.float32)
    return Sampling(column(temperature, torch.float32), seed, position, stream, top_k, top_p, min_p)


def assert_tokens(tokens, scores, atol):
    """Each token is the arg-max of `scores`, or its score differs from the best by less than the tolerance."""
    best = scores.amax(dim=1)
    chosen = scores.gather(1, tokens.cpu()[:, None])[:, 0]
    exact = tokens.cpu() == lowest_argmax(scores)
    assert (exact | (best - chosen < atol)).all()
    assert exact.double().mean() > 0.9


# Greedy


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_torch(backend, dtype, options):
    for rows, width, vocab in ((7, 83, 769), (1, 769, 5125), (3, 64, 1)):
        args = case(Inputs(backend.device, dtype), rows, width, vocab, **OPTIONS[options])
        normed = F.rms_norm(args["hidden"].double(), (width,), args["norm_weight"].double(), EPS).to(dtype).double()
        bias = args["bias"].double() if "bias" in args else None
        logits = F.linear(normed, args["lm_head"].double(), bias) * args.get("logit_scale", 1.0)
        if softcap := args.get("softcap"):
            logits = softcap * torch.tanh(logits / softcap)
        received = torch.empty(rows, vocab, device=backend.device)

        token, logprob, confidence = exit_head(**args, logits_out=received)

        logits = logits.cpu()
        assert (token.dtype, logprob.dtype, confidence.dtype) == (torch.int64, torch.float32, torch.float32)
        assert_close(received, logits.float(), OP, dtype)
        assert torch.equal(token.cpu(), lowest_argmax(received))
        assert_tokens(token, logits, tolerance(dtype, OP).atol)
        logprobs = logits.log_softmax(dim=1)
        assert_close(logprob, logprobs.gather(1, token.cpu()[:, None])[:, 0].float(), OP, dtype)
        assert_close(confidence, logprobs.amax(dim=1).exp().float(), OP, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_lowest_index_wins_ties(backend, dtype):
    for seed, (rows, width, vocab) in enumerate([(7, 5, 83), (3, 83, 769), (5, 16, 5125), (2, 8, 7)]):
        args, exact = whole_number_case(Inputs(backend.device, dtype, seed=seed), rows, width, vocab)
        received = torch.empty(rows, vocab, device=backend.device)
        token, logprob, _ = exit_head(**args, logits_out=received)
        assert torch.equal(received.cpu(), exact.float())
        assert torch.equal(token.cpu(), lowest_argmax(exact))
        assert_close(logprob, exact.log_softmax(dim=1).amax(dim=1).float())


def test_all_logits_equal(backend):
    args = case(Inputs(backend.device), 3, 16, 769)
    args["lm_head"].zero_()
    token, logprob, confidence = exit_head(**args)
    assert token.tolist() == [0, 0, 0]
    assert_close(confidence, torch.full((3,), 1 / 769))
    assert_close(logprob, torch.full((3,), 1 / 769).log())


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_nan_logits_are_never_chosen(backend, sample):
    inputs = Inputs(backend.device)
    args = case(inputs, 4, 16, 50)
    sampling = draws(inputs, 4, temperature=[1.0, 0.5, 0.0, 1.0]) if sample else None
    clean = exit_head(**args, sampling=sampling).token
    args["lm_head"][clean] = float("nan")
    token = exit_head(**args, sampling=sampling).token
    assert not set(token.tolist()) & set(clean.tolist())
    args["lm_head"][:] = float("nan")
    assert exit_head(**args).token.tolist() == [0] * 4  # nothing to choose from: still a token of the vocabulary


def test_infinite_logits(backend):
    """Minus infinity is never chosen and changes no probability; plus infinity always is."""
    args = case(Inputs(backend.device), 3, 16, 50)
    bias = torch.zeros(50, device=backend.device)
    clean = exit_head(**{**args, "lm_head": args["lm_head"][10:]})
    bias[:10] = float("-inf")
    token, logprob, confidence = exit_head(**args, bias=bias)
    assert torch.equal(token, clean.token + 10)
    assert_close(logprob, clean.logprob)
    assert_close(confidence, clean.confidence)
    bias[7] = float("inf")
    assert exit_head(**args, bias=bias).token.tolist() == [7, 7, 7]


def test_large_logits(backend):
    args = case(Inputs(backend.device), 5, 64, 83, logit_scale=1e4)
    token, logprob, confidence = exit_head(**args)
    expected, *_ = reference(exit_head, **args)
    assert torch.equal(token.cpu(), expected.token)
    assert_close(logprob, torch.zeros(5))
    assert_close(confidence, torch.ones(5))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_strided_views_and_canaries(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    args = case(inputs, 5, 83, 131, bias=True)
    views = {n: strided(args[n]) for n in ("hidden", "norm_weight", "lm_head")}
    logits = Guarded((5, 131), torch.float32, backend.device)
    guarded = [Guarded((5,), d, backend.device) for d in (torch.int64, torch.float32, torch.float32)]
    out = ExitHead(*(g.view for g in guarded))
    sampling = draws(inputs, 5, temperature=[0.0, 1.0, 0.7, 0.0, 2.0], top_k=20, top_p=0.9, min_p=0.01)
    expected = exit_head(**args, sampling=sampling)

    result = exit_head(**{**args, **views}, sampling=sampling, logits_out=logits.view, out=out)

    assert all(a is b for a, b in zip(result, out, strict=True))
    for a, b in zip(result, expected, strict=True):
        assert_close(a, b, OP, dtype)
    for guard in (logits, *guarded):
        guard.assert_surroundings_unchanged()
    assert same_bits(views["hidden"], args["hidden"])


def test_no_rows(backend):
    assert exit_head(**case(Inputs(backend.device), 0, 16, 50)).token.shape == (0,)


# Sampling

FILTERS = {
    "none": {},
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.7),
    "min_p": dict(min_p=0.1),
    "all": dict(top_k=40, top_p=0.8, min_p=0.02),
    "off": dict(top_k=0, top_p=1.0, min_p=0.0),
    "narrow": dict(top_k=1, top_p=1e-6, min_p=1.0),
}


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_are_those_of_the_reference(backend, filters):
    """The same noise, the same filters: on random logits equal tokens but for near ties."""
    inputs = Inputs(backend.device)
    args = case(inputs, 64, 83, 769, logit_scale=3.0)
    sampling = draws(inputs, 64, temperature=0.8, seed=-5, stream=2**40 + 9, **FILTERS[filters])
    received = torch.empty(64, 769, device=backend.device)
    token, logprob, confidence = exit_head(**args, sampling=sampling, logits_out=received)
    on_cpu = Sampling(*(None if v is None else v.cpu() for v in sampling))
    assert_tokens(token, perturb(received.cpu(), on_cpu), 1e-4)
    logprobs = received.log_softmax(dim=1)
    assert_close(logprob, logprobs.gather(1, token[:, None])[:, 0])
    assert_close(confidence, logprobs.amax(dim=1).exp())


def test_more_rows_than_one_pass_over_the_head_takes(kernels):
    inputs = Inputs(kernels.device, torch.bfloat16)
    args = case(inputs, 131, 40, 83)
    sampling = draws(inputs, 131, temperature=0.8, top_k=9, top_p=0.9)
    together = exit_head(**args, sampling=sampling)
    for rows in (slice(0, 64), slice(64, 131), slice(130, 131)):
        some = Sampling(*(None if field is None else field[rows] for field in sampling))
        apart = exit_head(**args | dict(hidden=args["hidden"][rows]), sampling=some)
        assert all(same_bits(a[rows], b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("filters", ["all", "top_p"])
def test_draws_from_a_large_vocabulary(backend, filters):
    """More tiles than threads of a block, and a share of them that has tokens above the draw."""
    inputs = Inputs(backend.device, seed=4)
    args = case(inputs, 5, 8, 20011, logit_scale=2.0)
    sampling = draws(inputs, 5, temperature=1.3, seed=8, **FILTERS[filters])
    received = torch.empty(5, 20011, device=backend.device)
    token = exit_head(**args, sampling=sampling, logits_out=received).token
    on_cpu = Sampling(*(None if v is None else v.cpu() for v in sampling))
    assert_tokens(token, perturb(received.cpu(), on_cpu), 1e-4)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_draws_on_whole_number_logits_are_exact(backend, dtype, filters):
    inputs = Inputs(backend.device, dtype, seed=3)
    args, _ = whole_number_case(inputs, 48, 7, 131)
    temperature = [(0.0, 0.6, 1.0, 1.7)[i % 4] for i in range(48)]
    sampling = draws(inputs, 48, temperature=temperature, seed=11, **FILTERS[filters])
    expected, *_ = reference(exit_head, **args, sampling=sampling)
    assert torch.equal(exit_head(**args, sampling=sampling).token.cpu(), expected.token)


def test_filters_differ_by_row(backend):
    """Each row obeys its own settings: 0, 1 and 0 switch them off."""
    inputs = Inputs(backend.device)
    args = case(inputs, 6, 32, 83)
    args["hidden"] = args["hidden"][:1].expand(6, 32).contiguous()
    position = torch.full((6,), 3)
    settings = dict(temperature=[1.5, 1.5, 1.5, 1.5, 0.0, 1.5], top_k=[0, 2, 0, 0, 0, 0])
    settings |= dict(top_p=[1.0, 1.0, 0.2, 1.0, 1.0, 1.0], min_p=[0.0, 0.0, 0.0, 0.7, 0.0, 0.0])
    together = exit_head(**args, sampling=draws(inputs, 6, position=position, **settings)).token
    for row in range(6):
        one = {n: [v[row]] for n, v in settings.items()}
        single = draws(inputs, 1, position=position[:1], **one)
        alone = exit_head(**{**args, "hidden": args["hidden"][:1]}, sampling=single).token
        assert alone[0] == together[row]
    assert together[0] == together[5]
    assert together[4] == exit_head(**args).token[0]


def test_noise_is_coupled(backend):
    """A token depends on (seed, stream, position) and its logits, not on N, the row order, or the missing stream."""
    inputs = Inputs(backend.device)
    args = case(inputs, 16, 32, 769)
    position = torch.arange(100, 116)
    sampling = draws(inputs, 16, temperature=1.5, seed=torch.arange(16) % 3, stream=0, position=position)
    token = exit_head(**args, sampling=sampling).token
    assert torch.equal(exit_head(**args, sampling=sampling._replace(stream=None)).token, token)
    order = torch.tensor([3, 15, 0, 8, 7], device=backend.device)
    picked = Sampling(*(None if v is None else v[order] for v in sampling))
    assert torch.equal(exit_head(**{**args, "hidden": args["hidden"][order]}, sampling=picked).token, token[order])
    for field in ("seed", "stream", "position"):
        other = sampling._replace(**{field: getattr(sampling, field) + 1})
        assert not torch.equal(exit_head(**args, sampling=other).token, token), field


def test_temperature_zero_is_greedy(backend):
    inputs = Inputs(backend.device)
    args = case(inputs, 8, 32, 769)
    greedy = exit_head(**args)
    for filters in FILTERS.values():
        mixed = draws(inputs, 8, temperature=[0.0, 1.0] * 4, **filters)
        for a, b in zip(exit_head(**args, sampling=mixed), greedy, strict=True):
            assert_close(a[::2], b[::2])


def chi_square(observed, probabilities):
    """Pearson's statistic over the cells that can occur; nothing may fall into the others."""
    expected = probabilities * observed.sum()
    possible = probabilities > 0
    assert (observed[~possible] == 0).all()
    return float((((observed - expected) ** 2) / expected)[possible].sum())


@pytest.mark.long_interpreted
@pytest.mark.parametrize(
    "filters", [{}, dict(top_k=3), dict(top_p=0.8), dict(min_p=0.3), dict(top_k=5, top_p=0.9)], ids=str
)
def test_draws_follow_the_softmax(backend, filters):
    """6000 positions of one distribution over 7 tokens; 6 degrees of freedom exceed 38 once in a million."""
    inputs = Inputs(backend.device, seed=1)
    args = case(inputs, 1, 16, 7)
    logits = torch.empty(1, 7, device=backend.device)
    exit_head(**args, logits_out=logits)
    args["hidden"] = args["hidden"].expand(6000, 16).contiguous()
    sampling = draws(inputs, 6000, temperature=0.7, seed=42, **filters)
    counts = torch.bincount(exit_head(**args, sampling=sampling).token.cpu(), minlength=7).double()
    first = Sampling(*(None if v is None else v[:1].cpu() for v in sampling))
    probabilities = filter_scores(logits.cpu() / 0.7, first).double().softmax(dim=1)[0]
    assert (probabilities > 0).sum() > 1
    assert chi_square(counts, probabilities) < 38
    shifted = probabilities.roll(1).clamp(min=1e-9)
    assert chi_square(counts, shifted / shifted.sum()) > 38


@pytest.mark.long_interpreted
@pytest.mark.parametrize("along", ["position", "stream", "seed"])
def test_neighbouring_draws_are_independent(backend, along):
    """Pairs of successive draws over 3 tokens: 8 degrees of freedom exceed 43 once in a million."""
    inputs = Inputs(backend.device)
    args = case(inputs, 1, 16, 3)
    args["hidden"] = args["hidden"].expand(6001, 16).contiguous()
    settings = dict(position=7, seed=7, stream=7) | {along: torch.arange(6001)}
    token = exit_head(**args, sampling=draws(inputs, 6001, **settings)).token.cpu()
    logits = torch.empty(6001, 3, device=backend.device)
    exit_head(**args, logits_out=logits)
    p = logits[0].cpu().double().softmax(dim=0)
    pairs = torch.bincount(token[:-1] * 3 + token[1:], minlength=9).double()
    assert chi_square(pairs, torch.outer(p, p).flatten()) < 43


# The filters of the reference against transformers' own


WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
SETTINGS = [("top_k", 1), ("top_k", 500), ("top_p", 0.3), ("top_p", 0.95), ("min_p", 0.1), ("min_p", 0.9)]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_filters_equal_transformers(name, value):
    inputs = Inputs("cpu")
    scores = inputs.randn(40, 83, scale=3)
    expected = WARPERS[name](value)(None, scores)
    assert torch.equal(filter_scores(scores, draws(inputs, 40, **{name: value})), expected)
    assert expected.isfinite().any(dim=1).all()


def test_filters_in_transformers_order():
    inputs = Inputs("cpu")
    scores = inputs.randn(40, 83, scale=3)
    expected = MinPLogitsWarper(0.1)(None, TopPLogitsWarper(0.8)(None, TopKLogitsWarper(9)(None, scores)))
    assert torch.equal(filter_scores(scores, draws(inputs, 40, top_k=9, top_p=0.8, min_p=0.1)), expected)


def test_filters_keep_ties_at_the_edge():
    scores = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]])
    inputs = Inputs("cpu")
    for filters in (dict(top_k=2), dict(top_p=0.5)):
        kept = filter_scores(scores, draws(inputs, 1, **filters)).isfinite()
        assert kept.tolist() == [[False, True, True, True, True]]


# Invariance


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_a_row_depends_on_itself_alone(kernels, dtype, sample):
    inputs = Inputs(kernels.device, dtype)
    args = case(inputs, 17, 130, 1543, bias=True)
    sampling = draws(inputs, 17, temperature=[0.0, 1.0, 0.7] * 5 + [1.0, 1.0], top_k=50, top_p=0.9) if sample else None

    def call(rows, hidden=args["hidden"], **more):
        picked = sampling and Sampling(*(None if v is None else v[rows] for v in sampling))
        return exit_head(**{**args, "hidden": hidden[rows]}, sampling=picked, **more)

    singles = [call(slice(i, i + 1)) for i in range(17)]
    alone = [torch.cat(parts) for parts in zip(*singles, strict=True)]
    poisoned = clone(args["hidden"])
    poisoned[1::2] = float("nan")
    for threads in (1, 2):
        with num_threads(threads):
            logits = torch.empty(17, 1543, device=kernels.device)
            for result, step in (
                (call(slice(None)), 1),
                (call(slice(None), logits_out=logits), 1),
                (call(slice(0, 4)), 1),
                (call(slice(None), strided(args["hidden"])), 1),
                (call(slice(None), poisoned), 2),
            ):
                for part, wanted in zip(result, alone, strict=True):
                    assert same_bits(part[::step], wanted[: len(part)][::step])


# Bad arguments


def arguments():
    inputs = Inputs("cpu")
    sampling = draws(inputs, 3, stream=0, top_k=5, top_p=0.9, min_p=0.1)
    out = ExitHead(torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(3))
    return case(inputs, 3, 16, 50, bias=True) | dict(sampling=sampling, logits_out=torch.zeros(3, 50), out=out)


@bad_tensors(
    "hidden", "norm_weight", "lm_head", "bias", *(f"sampling.{field}" for field in Sampling._fields),
    "logits_out", *(f"out.{field}" for field in ExitHead._fields),
)  # fmt: skip
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(exit_head, arguments(), path, defect)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(eps=0.0), ValueError, "eps=0.0: must be > 0"),
        (dict(softcap=0.0), ValueError, "softcap=0.0: must be > 0"),
        (dict(softcap=-1.0), ValueError, "softcap=-1.0: must be > 0"),
        (dict(logit_scale=0.0), ValueError, "logit_scale=0.0: must be > 0"),
        (dict(logit_scale=float("nan")), ValueError, "logit_scale=nan: must be > 0"),
        (dict(sampling=(torch.ones(3),) * 3), TypeError, "sampling: expected a Sampling, got tuple"),
        (dict(sampling=0.7), TypeError, "sampling: expected a Sampling, got float"),
        (dict(sampling=Sampling(None, None, None)), TypeError, "sampling.temperature: expected a tensor, got NoneType"),
        (dict(out=torch.zeros(3)), TypeError, "out: expected an ExitHead, got Tensor"),
        (dict(lm_head=torch.ones(0, 16), bias=None, logits_out=None), ValueError, "lm_head: an empty vocabulary"),
    ],
)
def test_rejects(change, error, message):
    assert_rejects(exit_head, {**arguments(), **change}, error, message)
