"""The native CPU backend with weights in 8 and 4 bits, in every variant this machine runs."""

from __future__ import annotations

import pytest
import torch
from op_inputs import FLOATS, Guarded, Inputs, dtype_name, num_threads, same_bits, strided
from test_decoder_stack import EPS, case, copied, everything
from test_exit_head import assert_tokens, draws
from tolerances import assert_close, tolerance

from layerskip_kernels import reference, registry, use_backend
from layerskip_kernels.native import _cpu
from layerskip_kernels.native.cpu import OPS
from layerskip_kernels.ops import DecoderLayers, QuantizedWeight, quantize
from layerskip_kernels.ops.decoder_stack import LINEARS
from layerskip_kernels.ops.quantized import stored
from layerskip_kernels.reference.decoder_stack import compose

VARIANTS = [name for name in _cpu.build_info()["variants"] if not _cpu.why_variant_unsupported(name)]
BITS = pytest.mark.parametrize("bits", [8, 4])
EVERY_COUNT = (*range(1, 10), 12, 13, 16, 17, 33, 64, 65, 67)  # rows: every tile, and several passes

small_linear, exit_head, decoder_stack = OPS["small_linear"], OPS["exit_head"], OPS["decoder_stack"]


@pytest.fixture(params=VARIANTS, autouse=True)
def variant(request):
    before = _cpu.active_variant()
    _cpu.set_variant(request.param)
    yield request.param
    _cpu.set_variant(before)


def quantized(inputs, rows, width, bits, group=64, *, offset=False):
    weight = quantize(inputs.weight(rows, width), bits, group)
    if not offset:
        return weight
    offset = torch.randn(weight.scale.shape, generator=inputs.generator) / width
    return weight._replace(scale=weight.scale.float(), offset=offset)  # as of a float32 model that torchao quantized


def apart(weight):
    """The same weight, its rows apart, unaligned, other numbers in between."""
    values = torch.full((weight.values.shape[0], weight.values.shape[1] + 7), 77, dtype=weight.values.dtype)
    view = values[:, 3:-4].copy_(weight.values)
    return QuantizedWeight(
        view, strided(weight.scale), weight.group, None if weight.offset is None else strided(weight.offset)
    )


@pytest.mark.parametrize(
    ("rows", "outputs", "width", "group"),
    [
        (1, 1, 2, 64),
        (5, 33, 770, 128),
        (9, 101, 30, 64),
        (66, 12, 100, 64),
        (3, 26, 5126, 192),
        (17, 50, 2048, 2048),
        (6, 29, 2046, 64),
        (35, 60, 3072, 128),
    ],
)
@BITS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_small_linear_matches_the_reference(dtype, bits, rows, outputs, width, group):
    inputs = Inputs("cpu", dtype)
    x, bias, residual = inputs.randn(rows, width), inputs.randn(outputs), inputs.randn(rows, outputs)
    for offset in (False, True):
        weight = quantized(inputs, outputs, width, bits, group, offset=offset)
        assert_close(small_linear(x, weight), reference.small_linear(x, weight))
        more = dict(bias=bias, residual=residual, norm=(inputs.norm(width), EPS))
        assert_close(small_linear(x, weight, **more), reference.small_linear(x, weight, **more))


@BITS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_whole_numbers_are_exact(dtype, bits):
    inputs = Inputs("cpu", dtype)
    x, b = inputs.integers(-2, 3, 5, 202), inputs.integers(-3, 4, 37)
    q = torch.randint(-2, 3, (37, 202), generator=inputs.generator)
    scale = torch.randint(-2, 3, (37, 2), generator=inputs.generator).float()
    offset = torch.randint(-1, 2, (37, 2), generator=inputs.generator).float()
    exact = q.double() * scale.double().repeat_interleave(128, 1)[:, :202]
    exact += offset.double().repeat_interleave(128, 1)[:, :202]
    weight = QuantizedWeight(stored(q.to(torch.int8), bits), scale, 128, offset)
    assert torch.equal(small_linear(x, weight, bias=b), (x.double() @ exact.T + b.double()).to(dtype))


def test_the_largest_products_do_not_overflow():
    """-128, which quantize() never gives, times the largest a lane holds, 64 times over."""
    for value in (1.999999, -1.999999):
        x = torch.full((3, 1090), value)
        weight = QuantizedWeight(torch.full((5, 1090), -128, dtype=torch.int8), torch.ones(5, 18), 64)
        expected = torch.full((3, 5), -128 * 1090 * value)
        torch.testing.assert_close(small_linear(x, weight), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [64, 770, 1090, 2048, 2112])
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_a_row_depends_on_itself_alone(dtype, bits, width):
    """Not on the other rows, how many there are, the threads, the strides, or the weights it shares a pass with."""
    inputs = Inputs("cpu", dtype)
    x, b = inputs.randn(67, width), inputs.randn(53)
    w, other = quantized(inputs, 53, width, bits, 128, offset=True), quantized(inputs, 24, width, bits)
    alone = torch.cat([small_linear(x[i : i + 1], w, bias=b) for i in range(67)])
    poisoned = x.clone()
    poisoned[1::2] = float("nan")
    for threads in (1, 3):
        with num_threads(threads):
            for rows in EVERY_COUNT:
                assert same_bits(small_linear(x[:rows], w, bias=b), alone[:rows]), f"{rows} rows, {threads} threads"
            assert same_bits(small_linear(strided(x), apart(w), bias=b), alone)
            assert same_bits(small_linear(poisoned, w, bias=b)[::2], alone[::2])
            assert same_bits(small_linear(x[:7], [other, w], bias=[None, b])[1], alone[:7])


@BITS
def test_several_tasks_and_prompts(bits):
    inputs = Inputs("cpu", torch.bfloat16)
    x, w = inputs.randn(130, 1026), quantized(inputs, 700, 1026, bits)
    results = []
    for threads in (1, 3):
        with num_threads(threads):
            results.append(small_linear(x, w))
    assert torch.equal(*results)
    assert_close(results[0], reference.small_linear(x, w))


@BITS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_fused_equals_its_parts(dtype, bits):
    inputs = Inputs("cpu", dtype)
    x, b, norm = inputs.randn(5, 130), inputs.randn(47), (inputs.norm(130), EPS)
    w, second = quantized(inputs, 47, 130, bits), quantized(inputs, 20, 130, bits, 128)
    residual = inputs.randn(5, 47)
    normed = OPS["rms_norm"](x, *norm)
    plain = small_linear(normed, w, bias=b)
    out = Guarded((5, 47), dtype, "cpu")
    assert small_linear(x, w, bias=b, norm=norm, out=out.view) is out.view
    out.assert_surroundings_unchanged()
    assert same_bits(out.view, plain)
    assert same_bits(small_linear(normed, w, bias=b, residual=residual), residual + plain)
    first, other = small_linear(x, [w, second], bias=[b, None], norm=norm)
    assert same_bits(first, plain) and same_bits(other, small_linear(normed, second))


@BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_nan_or_infinity_is_nan(bits, bad):
    inputs = Inputs("cpu")
    for rows, width, columns in ((5, 200, (0, 63, 130, 199)), (17, 1100, (0, 1023, 1024, 1099))):
        x, w = inputs.randn(rows, width), quantized(inputs, 33, width, bits)
        clean, others = small_linear(x, w), [i for i in range(rows) if i != 2]
        for column in columns:
            poisoned = x.clone()
            poisoned[2, column] = bad
            result = small_linear(poisoned, w)
            assert result[2].isnan().all() and reference.small_linear(poisoned, w)[2].isnan().all()
            assert same_bits(result[others], clean[others])


@BITS
def test_extreme_activations(bits):
    """The largest and the smallest numbers, blocks of zeros, and what is too small to count."""
    inputs = Inputs("cpu")
    w = quantized(inputs, 33, 128, bits)
    x = inputs.randn(6, 128)
    x[0, :64], x[1] = 0, 0
    x[2] = x[2].sign() * 1e36
    x[3], x[4, 64:], x[5, ::2] = x[3] * 2.0**-99, x[4, 64:] * 1e-38, 1e-44
    w = w._replace(scale=w.scale / 100)
    torch.testing.assert_close(small_linear(x, w), reference.small_linear(x, w), rtol=1e-4, atol=1e-7)
    assert (small_linear(x, w)[1] == 0).all() and small_linear(x, w).isfinite().all()


@BITS
def test_empty_shapes(bits):
    w = quantize(torch.randn(5, 64), bits)
    none = w._replace(values=w.values[:0], scale=w.scale[:0])
    assert small_linear(torch.randn(0, 64), w).shape == (0, 5)
    assert small_linear(torch.randn(3, 64), none).shape == (3, 0)
    narrow = w._replace(values=w.values[:, :0].contiguous(), scale=w.scale[:, :0].contiguous())
    assert torch.equal(small_linear(torch.randn(3, 0), narrow), torch.zeros(3, 5))


@pytest.mark.parametrize("field", ["values", "scale", "offset"])
def test_refuses_what_has_no_plain_memory(field):
    class Wrapped(torch.Tensor):
        pass

    w = quantize(torch.randn(5, 64), 8)
    w = w._replace(offset=w.scale.clone())
    bad = w._replace(**{field: getattr(w, field).as_subclass(Wrapped)})
    with pytest.raises(TypeError, match="Wrapped has no plain memory"):
        small_linear(torch.randn(2, 64), bad)


# quantize


def awkward(inputs, rows, width):
    """Random rows, and rows of what rounding gets wrong first."""
    weight = inputs.weight(rows, width)
    tiny = torch.finfo(inputs.dtype).smallest_normal
    if rows > 7:
        weight[1] = 0
        weight[2, ::2] = -0.0
        weight[3] = inputs.integers(-1, 2, width)  # ties of largest magnitude, of both signs
        weight[4] = inputs.integers(-254, 255, width) / 2  # whole and half steps
        weight[5] = inputs.integers(-40, 41, width) * (tiny * torch.finfo(inputs.dtype).eps)  # subnormal
        weight[6] = inputs.randn(width) * tiny * 8
        weight[7] = inputs.randn(width).sign() * torch.finfo(inputs.dtype).max / 2
    return weight


def assert_same_quantized(got, expected):
    assert (got.bits, got.group, got.offset) == (expected.bits, expected.group, None)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.scale.view(torch.int16), expected.scale.view(torch.int16))  # -0 is not 0


@pytest.mark.parametrize(
    ("rows", "width", "group"),
    [(1, 1, 64), (1, 2, 64), (9, 7, 64), (9, 130, 64), (9, 322, 128), (12, 63, 4096), (8, 4096, 4096), (300, 514, 192)],
)
@BITS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_quantize_has_the_bits_of_the_reference(dtype, bits, rows, width, group):
    weight = awkward(Inputs("cpu", dtype), rows, width + width % 2 if bits == 4 else width)
    error, norm, expected_error, expected_norm = (torch.empty(rows) for _ in range(4))
    expected = reference.quantize(weight, bits, group, error=expected_error, norm=expected_norm)
    for threads in (1, 3):
        with num_threads(threads):
            for layout in (weight, strided(weight)):
                assert_same_quantized(quantize(layout, bits, group), expected)
                assert_same_quantized(quantize(layout, bits, group, error=error, norm=norm), expected)
                torch.testing.assert_close(error, expected_error, rtol=1e-5, atol=0)
                torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)
                alone = torch.empty(rows)
                quantize(layout, bits, group, error=alone)
                assert same_bits(alone, error)


@BITS
def test_quantize_names_the_first_row_that_is_not_finite(bits):
    weight = torch.ones(5000, 66)
    for rows, value in (([4999], torch.inf), ([4999, 2500, 77, 4000], torch.nan), ([0, 4999], -torch.inf)):
        bad = weight.clone()
        bad[rows, 65] = value
        error, norm = torch.full((5000,), 5.0), torch.full((5000,), 6.0)
        for threads in (1, 3):
            with (
                num_threads(threads),
                pytest.raises(ValueError, match=f"^weight: NaN or infinity in row {min(rows)}, "),
            ):
                quantize(bad, bits, error=error, norm=norm)
        assert (error == 5).all() and (norm == 6).all()


@BITS
def test_quantize_without_rows_or_columns(bits):
    norm = torch.ones(3)
    assert quantize(torch.ones(0, 64), bits).shape == (0, 64)
    assert quantize(torch.ones(3, 0), bits, norm=norm).shape == (3, 0) and not norm.any()


def test_quantize_runs_here_unless_the_reference_is_asked_for(monkeypatch):
    weight, calls = torch.nn.Parameter(torch.randn(3, 64)), []
    for backend in ("cpu", "reference"):
        monkeypatch.setitem(registry._backend(backend).OPS, "quantize", lambda *_, b=backend, **__: calls.append(b))
    for backend in ("auto", "cpu", "triton", "reference"):
        with use_backend(backend):
            quantize(weight, 8)
    assert calls == ["cpu", "cpu", "cpu", "reference"]


# exit_head


@BITS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_head_matches_the_reference(dtype, bits):
    inputs = Inputs("cpu", dtype)
    hidden, norm = inputs.randn(7, 130), inputs.norm(130)
    head = quantized(inputs, 1000, 130, bits, 128, offset=True)
    for more in ({}, dict(bias=inputs.randn(1000), softcap=3.0), dict(sampling=draws(inputs, 7, top_k=40, top_p=0.9))):
        ours, theirs = torch.empty(7, 1000), torch.empty(7, 1000)
        got = exit_head(hidden, norm, head, eps=EPS, logits_out=ours, **more)
        expected = reference.exit_head(hidden, norm, head, eps=EPS, logits_out=theirs, **more)
        assert_close(ours, theirs, "exit_head", dtype)
        if "sampling" not in more:
            assert_tokens(got.token, theirs, tolerance(dtype, "exit_head").atol)
        same = got.token == expected.token
        assert same.sum() >= 6
        assert_close(got.logprob[same], expected.logprob[same], "exit_head", dtype)
        assert_close(got.confidence, expected.confidence, "exit_head", dtype)


@BITS
def test_head_lowest_index_wins_ties(bits):
    inputs = Inputs("cpu", torch.bfloat16)
    hidden, norm = inputs.integers(0, 2, 5, 64) * 2 - 1, inputs.integers(1, 3, 64)  # mean of squares 1
    stored = inputs.integers(-1, 2, 700, 64)
    stored[:, 0] = 127 if bits == 8 else -8  # so that the scale is 1 (8 bits: its largest value)
    head = quantize(stored, bits)
    assert torch.equal(head.scale, torch.ones(700, 1))
    exact = (hidden.double() * norm.double()) @ stored.double().T
    logits = torch.empty(5, 700)
    token = exit_head(hidden, norm, head, eps=1e-12, logits_out=logits).token
    assert torch.equal(logits, exact.float())
    assert token.tolist() == [row.index(max(row)) for row in exact.tolist()]


@BITS
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_head_row_depends_on_itself_alone(bits, sample):
    inputs = Inputs("cpu", torch.bfloat16)
    hidden, norm, head = inputs.randn(66, 194), inputs.norm(194), quantized(inputs, 451, 194, bits)
    sampling = draws(inputs, 66, top_p=0.8) if sample else None

    def rows(some):
        own = None if sampling is None else type(sampling)(*(None if t is None else t[some] for t in sampling))
        return exit_head(hidden[some], norm, head, eps=EPS, sampling=own)

    alone = [torch.cat(parts) for parts in zip(*(rows(slice(i, i + 1)) for i in range(66)))]
    for threads in (1, 3):
        with num_threads(threads):
            for count in (2, 3, 8, 17, 66):
                assert all(same_bits(a, b[:count]) for a, b in zip(rows(slice(count)), alone))


# decoder_stack

KINDS = {
    "8 bits": dict.fromkeys(LINEARS, 8),
    "4 bits": dict.fromkeys(LINEARS, 4),
    "mixed": dict(q=4, k=4, v=4, gate=8, up=8, down=4),
}


def quantized_layers(args, kind):
    layers = (
        one._replace(**{name: quantize(getattr(one, name), bits) for name, bits in KINDS[kind].items()})
        for one in args["layers"]
    )
    return {**args, "layers": DecoderLayers(layers)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_stack_equals_the_composition_and_the_reference(dtype, kind):
    args = quantized_layers(everything(Inputs("cpu", dtype)), kind)
    composed, expected = copied(args), copied(args)
    with use_backend("cpu"):
        ops = registry.bind(torch.device("cpu"), dtype, quantized=True)
    assert set(ops.backends.values()) == {"cpu"}
    decoder_stack(**args)
    compose(ops, **composed)
    compose(registry.bind(torch.device("cpu"), dtype, "reference", quantized=True), **expected)
    for name in ("hidden", "k_cache", "v_cache"):
        assert same_bits(args[name], composed[name]), name
    for row, (count, ours, theirs) in enumerate(zip(args["num_queries"], args["hidden"], expected["hidden"])):
        torch.testing.assert_close(ours[:count], theirs[:count], **STACK_TOLERANCE[dtype], msg=f"sequence {row}")


# Beside a flipped rounding of the activations: another step of 16 bits, which the reference takes elsewhere.
STACK_TOLERANCE = {torch.float32: dict(atol=2e-3, rtol=2e-3), torch.bfloat16: dict(atol=8e-2, rtol=5e-2)}


@BITS
def test_stack_sequence_depends_on_itself_alone(bits):
    args = quantized_layers(case(Inputs("cpu", torch.bfloat16)), f"{bits} bits")
    one = copied(args)
    one |= {n: one[n][1:2].clone() for n in ("hidden", "lengths", "positions")}
    one["slot_ids"] = torch.ones(1, dtype=torch.int32)
    decoder_stack(**args)
    decoder_stack(**one)
    assert same_bits(args["hidden"][1:2], one["hidden"])
