"""The repetition penalty of `exit_head`."""

import pytest
import torch
from op_inputs import FLOATS, Inputs, assert_rejects, assert_rejects_tensor, bad_tensors, dtype_name, same_bits, strided
from test_exit_head import EPS, assert_tokens, case, draws, whole_number_case
from transformers.generation import RepetitionPenaltyLogitsProcessor

from layerskip_kernels.ops import RepetitionPenalty, exit_head
from layerskip_kernels.reference.exit_head import perturb

OP = "exit_head"
ROWS, WIDTH, VOCAB = 6, 83, 769
FACTORS = [1.0, 1.3, 0.7, 2.0, 1e-3, 50.0]


def penalty(inputs, vocab=VOCAB, share=1, factors=FACTORS):
    """Windows of `share` rows. About one token in four is seen, from some position on; the first and last token are."""
    sequences = ROWS // share
    first_seen = inputs.integers(0, 4 * share, sequences, vocab).cpu()
    first_seen = torch.where(first_seen < share, first_seen, 255).to(torch.uint8)
    first_seen[:, [0, -1]] = 0
    position = torch.arange(share, dtype=torch.uint8).repeat(sequences)
    fields = torch.tensor(factors[: sequences * share]), first_seen, position
    return RepetitionPenalty(*(field.to(inputs.device) for field in fields))


def seen_of(repetition):
    """bool [N, V]."""
    rows = len(repetition.position)
    return repetition.first_seen.repeat_interleave(repetition.share(rows), 0) <= repetition.position[:, None]


def expected_logits(logits, repetition):
    """What transformers makes of them, row by row."""
    rows = zip(logits.cpu(), repetition.factor.tolist(), seen_of(repetition).cpu())
    return torch.cat(
        [
            RepetitionPenaltyLogitsProcessor(factor)(seen.nonzero()[:, 0][None], row[None].clone())
            for row, factor, seen in rows
        ]
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_transformers(backend, dtype):
    for share, options in ((1, {}), (3, {}), (ROWS, dict(bias=True, softcap=1.5, logit_scale=0.5))):
        inputs = Inputs(backend.device, dtype)
        args, repetition = case(inputs, ROWS, WIDTH, VOCAB, **options), penalty(inputs, share=share)
        raw, received = (torch.empty(ROWS, VOCAB, device=backend.device) for _ in range(2))
        exit_head(**args, logits_out=raw)
        result = exit_head(**args, penalty=repetition, logits_out=received)
        wanted = expected_logits(raw, repetition)
        torch.testing.assert_close(received.cpu(), wanted, rtol=1e-6, atol=0)
        assert not torch.equal(received, raw)
        logprobs = received.log_softmax(-1)
        assert_tokens(result.token, received.cpu(), 0.0)
        torch.testing.assert_close(result.logprob, logprobs.gather(1, result.token[:, None])[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(result.confidence, logprobs.amax(-1).exp(), rtol=1e-5, atol=1e-6)
        # the layout of `first_seen`, and whether logits are kept, make no difference
        again = exit_head(**args, penalty=repetition._replace(first_seen=strided(repetition.first_seen)))
        assert all(same_bits(a, b) for a, b in zip(again, result))


@pytest.mark.parametrize("filters", [{}, dict(top_k=40), dict(top_p=0.8), dict(min_p=0.02)], ids=str)
def test_comes_before_temperature_and_filters(backend, filters):
    inputs = Inputs(backend.device)
    args, repetition = case(inputs, ROWS, WIDTH, VOCAB), penalty(inputs)
    sampling = draws(inputs, ROWS, temperature=[0.0, 1.0, 0.7, 1.3, 1.0, 0.5], seed=3, **filters)
    kept = torch.empty(ROWS, VOCAB, device=backend.device)
    result = exit_head(**args, penalty=repetition, sampling=sampling, logits_out=kept)
    assert_tokens(result.token, perturb(kept, sampling).cpu(), 1e-4)
    without_memory = exit_head(**args, penalty=repetition, sampling=sampling)
    assert all(same_bits(a, b) for a, b in zip(without_memory, result))


def test_ties_and_a_factor_of_one(backend):
    """Whole numbers: a factor of 2 is exact, so ties come out exactly; without one nothing changes, not a bit."""
    inputs = Inputs(backend.device)
    args, exact = whole_number_case(inputs, ROWS, WIDTH, VOCAB)
    repetition = penalty(inputs, factors=[2.0] * ROWS)
    seen = seen_of(repetition).cpu()
    halved = torch.where(seen, torch.where(exact < 0, exact * 2, exact / 2), exact)
    token = exit_head(**args, penalty=repetition).token
    assert token.tolist() == [row.index(max(row)) for row in halved.tolist()]
    off = exit_head(**args, penalty=repetition._replace(factor=torch.ones_like(repetition.factor)))
    assert all(same_bits(a, b) for a, b in zip(off, exit_head(**args)))


def test_nan_and_infinite_logits(backend):
    args = case(Inputs(backend.device), 3, 16, 50)
    clean = exit_head(**args).token
    args["lm_head"][clean] = float("nan")
    zeros = torch.zeros(3, 50, dtype=torch.uint8, device=backend.device)
    everything = RepetitionPenalty(torch.full((3,), 1.5, device=backend.device), zeros, zeros[:, 0].contiguous())
    assert not set(exit_head(**args, penalty=everything).token.tolist()) & set(clean.tolist())


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_a_row_depends_on_itself_alone(kernels, dtype):
    inputs = Inputs(kernels.device, dtype)
    args, repetition = case(inputs, ROWS, 130, 1543), penalty(inputs, vocab=1543, share=ROWS)
    whole = exit_head(**args, penalty=repetition)
    for row in range(ROWS):
        here = slice(row, row + 1)
        own = RepetitionPenalty(repetition.factor[here], repetition.first_seen, repetition.position[here])
        alone = exit_head(**{**args, "hidden": args["hidden"][row : row + 1]}, penalty=own)
        assert all(same_bits(a[0], b[row]) for a, b in zip(alone, whole))


def arguments():
    inputs = Inputs("cpu")
    zeros = torch.zeros(3, 50, dtype=torch.uint8)
    return case(inputs, 3, 16, 50) | dict(eps=EPS, penalty=RepetitionPenalty(torch.ones(3), zeros, zeros[:, 0].clone()))


@bad_tensors("penalty.factor", "penalty.position")
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(exit_head, arguments(), path, defect)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.2, TypeError, "penalty: expected a RepetitionPenalty, got float"),
        (RepetitionPenalty(None, None, None), TypeError, "penalty.factor: expected a tensor, got NoneType"),
        (
            arguments()["penalty"]._replace(first_seen=torch.zeros(2, 50, dtype=torch.uint8)),
            ValueError,
            "penalty.first_seen: 2 rows, expected a divisor of N = 3",
        ),
        (
            arguments()["penalty"]._replace(first_seen=torch.zeros(3, 49, dtype=torch.uint8)),
            ValueError,
            "penalty.first_seen:",
        ),
    ],
)
def test_rejects(value, error, message):
    assert_rejects(exit_head, {**arguments(), "penalty": value}, error, message)
