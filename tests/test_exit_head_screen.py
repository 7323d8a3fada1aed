"""`exit_head` with a screen: a quantized copy of the LM head that is read in its place."""

import pytest
import torch
from op_inputs import FLOATS, Inputs, assert_rejects, dtype_name, num_threads, same_bits, strided
from test_exit_head import EPS, assert_tokens, case, draws, whole_number_case
from tolerances import tolerance

from layerskip_kernels import reference, use_backend
from layerskip_kernels.native import _cpu
from layerskip_kernels.native.cpu import OPS
from layerskip_kernels.ops import QuantizedWeight, RepetitionPenalty, Screen, exit_head, head_screen, quantize
from layerskip_kernels.ops.exit_head import RESCORED

OP = "exit_head"
VARIANTS = [name for name in _cpu.build_info()["variants"] if not _cpu.why_variant_unsupported(name)]
SHAPES = [(1, 64, 17), (3, 770, 5125), (66, 30, 193), (7, 83, 1000)]
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
native = OPS["exit_head"]


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request):
    before = _cpu.active_variant()
    _cpu.set_variant(request.param)
    yield request.param
    _cpu.set_variant(before)


def samplings(inputs, rows):
    """None, and draws of which every third row is greedy."""
    temperature = [0.0 if row % 3 == 1 else 0.3 + row % 5 for row in range(rows)]
    return None, draws(inputs, rows, temperature=temperature, seed=3)


def filtered(inputs, rows):
    top_k = [(0, 9, RESCORED + 5)[row % 3] for row in range(rows)]
    return draws(inputs, rows, temperature=0.8, seed=5, top_k=top_k, top_p=[(1.0, 0.9)[row % 2] for row in range(rows)])


def penalty(inputs, rows, vocab):
    first_seen = torch.where(inputs.integers(0, 4, rows, vocab) == 0, 0, 255).to(torch.uint8)
    factor = torch.tensor([(1.3, 0.7, 40.0)[row % 3] for row in range(rows)])
    return RepetitionPenalty(factor, first_seen, torch.zeros(rows, dtype=torch.uint8))


@pytest.mark.parametrize(("rows", "width", "vocab"), SHAPES)
@DTYPES
def test_exact_to_the_bit(dtype, rows, width, vocab):
    inputs = Inputs("cpu", dtype)
    for scale in (1.0, 30.0):
        for options in ({}, dict(bias=True, softcap=3.0, logit_scale=0.5), dict(penalty=penalty(inputs, rows, vocab))):
            args = case(inputs, rows, width, vocab, **options)
            args["norm_weight"] = args["norm_weight"] * scale
            screen = head_screen(args["lm_head"], 8, exact=True)
            for sampling in (*samplings(inputs, rows), filtered(inputs, rows)):
                plain = native(**args, sampling=sampling)
                found = native(**args, sampling=sampling, screen=screen)
                assert torch.equal(found.token, plain.token)
                spread = 2 * float(screen.error.max()) * float(args["norm_weight"].norm()) * 2
                torch.testing.assert_close(found.logprob, plain.logprob, rtol=0, atol=1e-4 + 40 * spread)


@DTYPES
def test_exact_among_near_and_real_ties(dtype):
    """Rows so alike that the copy cannot tell them apart; and so many equal ones that the head has to be read."""
    inputs = Inputs("cpu", dtype)
    rows, width, vocab = 5, 192, 4000
    args = case(inputs, rows, width, vocab)
    alike = inputs.weight(1, width) + inputs.randn(vocab, width, scale=1e-3 * width**-0.5)
    args["lm_head"] = torch.where(torch.arange(vocab)[:, None] % 3 == 0, alike, args["lm_head"])
    integers, _ = whole_number_case(inputs, rows, width, vocab)
    constant = args | dict(lm_head=inputs.weight(1, width).expand(vocab, width).contiguous())
    for these in (args, integers, constant):
        screen = head_screen(these["lm_head"], 8, exact=True)
        for sampling in samplings(inputs, rows):
            plain = native(**these, sampling=sampling)
            assert torch.equal(native(**these, sampling=sampling, screen=screen).token, plain.token)
    assert native(**constant, screen=head_screen(constant["lm_head"], 8, exact=True)).token.tolist() == [0] * rows


@DTYPES
def test_the_error_is_a_bound(dtype):
    """Of all products, with columns that stand out, and rows of all sizes."""
    inputs = Inputs("cpu", dtype)
    for width in (64, 83, 2050):
        args = case(inputs, 9, width, 600)
        args["hidden"][:, ::17] *= 100
        args["lm_head"] *= torch.logspace(-4, 1, 600)[:, None].to(dtype)
        args["lm_head"][::5, ::13] *= 50
        screen = head_screen(args["lm_head"], 8, exact=True)
        exact, copied = (torch.empty(9, 600) for _ in range(2))
        native(**args, logits_out=exact)
        native(**args | dict(lm_head=screen.weight), logits_out=copied)
        x = reference.OPS["rms_norm"](args["hidden"], args["norm_weight"], EPS).double()
        bound = x.norm(dim=1, keepdim=True) * screen.error
        assert ((exact - copied).abs() <= bound).all()
        assert ((exact - copied).abs() > 0.02 * bound).any(), "a bound that says something"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "width", "vocab"), SHAPES)
@DTYPES
def test_the_best_rescored_match_the_reference(dtype, rows, width, vocab, bits):
    inputs = Inputs("cpu", dtype)
    for options in ({}, dict(bias=True, softcap=3.0, logit_scale=0.5), dict(penalty=penalty(inputs, rows, vocab))):
        args = case(inputs, rows, width - width % 2, vocab, **options)
        screen = head_screen(args["lm_head"], bits)
        for sampling in (*samplings(inputs, rows), filtered(inputs, rows)):
            logits, wanted, own = (torch.empty(rows, vocab) for _ in range(3))
            found = native(**args, sampling=sampling, screen=screen)
            kept = native(**args, sampling=sampling, screen=screen, logits_out=logits)
            assert all(same_bits(a, b) for a, b in zip(found, kept))
            expected = reference.OPS["exit_head"](**args, sampling=sampling, screen=screen, logits_out=wanted)
            native(**args, logits_out=own)
            atol = 10 * tolerance(dtype, OP).atol
            assert (found.token == expected.token).double().mean() > 0.9
            # a token more or less of those looked at again, where two are alike; a penalty makes rounding larger
            differ = (logits - wanted).abs() > atol * wanted.abs().clamp(min=1)
            assert differ.sum() <= 2 * rows // 20 + 2
            looked_at = (logits == own).sum(1)
            assert (looked_at >= min(RESCORED, vocab)).all()
            torch.testing.assert_close(found.confidence, expected.confidence, rtol=0.02, atol=0.01)


def test_rows_alone_say_the_same():
    inputs = Inputs("cpu", torch.bfloat16)
    args = case(inputs, 9, 192, 3000)
    exact, rescored = head_screen(args["lm_head"], 8, exact=True), head_screen(args["lm_head"], 4)
    for screen, further in ((exact, []), (rescored, [filtered(inputs, 9)])):
        for sampling in (*samplings(inputs, 9), *further):
            together = native(**args, sampling=sampling, screen=screen)
            with num_threads(2):
                assert all(map(same_bits, together, native(**args, sampling=sampling, screen=screen)))
            for row in range(9):
                own = sampling and type(sampling)(*(t if t is None else t[row : row + 1] for t in sampling))
                alone = native(**args | dict(hidden=args["hidden"][row : row + 1]), sampling=own, screen=screen)
                assert all(same_bits(a, b[row : row + 1]) for a, b in zip(alone, together))


@pytest.mark.parametrize("bits", [8, 4])
def test_only_rows_that_may_win_are_read(bits):
    """The others may hold anything."""
    inputs = Inputs("cpu", torch.bfloat16)
    args = case(inputs, 4, 512, 20000)
    logits = torch.empty(4, 20000)
    native(**args, logits_out=logits)
    screen = head_screen(args["lm_head"], bits, exact=bits == 8)
    plain = native(**args, screen=screen)
    near = (logits.amax(1, keepdim=True) - logits).amin(0) < 1.3
    assert 0 < near.sum() < 2000
    spoilt = torch.where(near[:, None], args["lm_head"], float("nan"))
    found = native(**args | dict(lm_head=spoilt), screen=screen)
    assert all(map(same_bits, found, plain))


def test_what_is_not_a_number():
    """Rows that are not finite are answered as without a screen, and their neighbours too."""
    inputs = Inputs("cpu")
    args = case(inputs, 4, 100, 700)
    args["hidden"][0, 3], args["hidden"][2, 5], args["hidden"][3] = float("nan"), float("inf"), 0
    plain = native(**args)
    found = native(**args, screen=head_screen(args["lm_head"], 8, exact=True))
    assert torch.equal(found.token, plain.token) and found.logprob[0].isnan() and found.logprob[2].isnan()
    rescored = native(**args, screen=head_screen(args["lm_head"], 4))
    assert rescored.logprob[0].isnan() and ((0 <= rescored.token) & (rescored.token < 700)).all()


def test_a_quantized_head_has_a_screen_too():
    inputs = Inputs("cpu", torch.bfloat16)
    args = case(inputs, 5, 192, 2000)
    own = args | dict(lm_head=quantize(args["lm_head"], 8))
    logits = torch.empty(5, 2000)
    native(**own, logits_out=logits)
    found = native(**own, screen=head_screen(args["lm_head"], 4))
    assert_tokens(found.token, logits, 0.05)


def test_layouts_make_no_difference():
    inputs = Inputs("cpu", torch.bfloat16)
    args = case(inputs, 5, 192, 2000)
    values, scale, group, _ = quantize(args["lm_head"], 8)
    apart = QuantizedWeight(strided(values), strided(scale), group)
    error = head_screen(args["lm_head"], 8, exact=True).error
    for one, other in ((None, None), (error, error)):
        plain = native(**args, screen=Screen(QuantizedWeight(values, scale, group), one))
        found = native(**args | dict(lm_head=strided(args["lm_head"])), screen=Screen(apart, other))
        assert all(map(same_bits, plain, found))


def test_wrong_ones_are_refused():
    inputs = Inputs("cpu")
    args = case(inputs, 2, 64, 50)
    screen = head_screen(args["lm_head"], 8, exact=True)
    with use_backend("cpu"):
        for wrong, error, sentence in (
            (screen.weight, TypeError, "screen: expected a Screen of a QuantizedWeight"),
            (Screen(args["lm_head"]), TypeError, "screen: expected a Screen of a QuantizedWeight"),
            (
                Screen(quantize(args["lm_head"], 4), screen.error),
                ValueError,
                "screen.weight: with an error it has 8 bits",
            ),
            (Screen(quantize(args["lm_head"][:40], 8)), ValueError, "screen.weight.values: .* expected .50, 64."),
            (Screen(screen.weight, screen.error[:40]), ValueError, "screen.error: "),
        ):
            assert_rejects(exit_head, args | dict(screen=wrong), error, sentence)
    with pytest.raises(ValueError, match="bits=4: an exact screen has 8"):
        head_screen(args["lm_head"], 4, exact=True)
    exact = exit_head(**args, screen=screen)
    with use_backend("reference"):
        assert torch.equal(exit_head(**args, screen=screen).token, exact.token)
