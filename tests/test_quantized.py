"""Quantized weights: their bits, how far they are from the weight, and what the ops make of them on every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_inputs import FLOATS, Inputs, assert_rejects, dtype_name, strided

from layerskip_kernels import registry, use_backend
from layerskip_kernels.ops import DecoderLayers, QuantizedWeight, dequantize, exit_head, quantize, small_linear
from layerskip_kernels.ops.quantized import numbers, stored
from layerskip_kernels.reference.quantized import product, rounded

BITS = pytest.mark.parametrize("bits", [8, 4])


@BITS
@pytest.mark.parametrize(("width", "group"), [(64, 64), (200, 64), (200, 128), (2, 64), (130, 4096)])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_every_value_is_the_nearest_its_group_has(dtype, width, group, bits):
    weight = Inputs("cpu", dtype).weight(5, width)
    quantized = quantize(strided(weight), bits, group)
    assert (quantized.bits, quantized.shape, quantized.group) == (bits, (5, width), group)
    assert quantized.values.shape == (5, width * bits // 8) and quantized.offset is None
    assert quantized.scale.shape == (5, -(-width // group)) and quantized.scale.dtype == torch.bfloat16
    assert quantized.nbytes == quantized.values.nbytes + quantized.scale.nbytes

    error = (dequantize(quantized) - weight.float()).abs()

    for i, columns in enumerate(torch.arange(width).split(group)):
        w, scale = weight[:, columns].float(), quantized.scale[:, i : i + 1]
        step = w.abs().amax(1, keepdim=True) / (127 if bits == 8 else 8)
        assert torch.equal(scale.abs(), step.to(torch.bfloat16))
        # With 4 bits there is no +8: of what lies beyond 7 steps up to one is lost, and a rounding's worth more.
        clipped = (bits == 4) & (w / scale > 7)
        assert (error[:, columns] <= scale.abs() * torch.where(clipped, 1.02, 0.5) * (1 + 1e-5)).all()


def test_bits_of_a_value():
    """One block: columns 2i and 2i + 1 in the low and the high nibble of byte i, 8 added."""
    q = torch.arange(16).repeat(1, 4) - 8
    quantized = quantize(q.float(), 4)
    assert torch.equal(quantized.scale, torch.ones(1, 1))
    assert quantized.values[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(dequantize(quantized), q.float())
    assert quantize(q.float() * 127 / 8, 8).values[0, :3].tolist() == [-127, -111, -95]


@BITS
@pytest.mark.parametrize("width", [2, 64, 130, 192, 576, 1024, 1090, 3070])
def test_order_of_columns(width, bits):
    """As csrc/cpu/quantization.h has it, column by column."""
    q = Inputs("cpu").integers(-8, 8, 3, width).to(torch.int8)
    values = stored(q, bits)
    assert torch.equal(numbers(values), q)
    whole, first = width // 64, 0
    while first < width:
        left = whole - first // 64
        blocks = 16 if left >= 16 else next((n for n in (8, 4, 2, 1) if n <= left), 0)
        for column in range(first, min(first + max(blocks, 1) * 64, width)):
            lane, within = divmod(column - first, 4 * max(blocks, 1))
            step, place = divmod(within, 4)
            if bits == 8:
                got = values[:, first + step * 64 + lane * 4 + place]
            elif blocks > 1:
                byte = values[:, first // 2 + step // 2 * 64 + lane * 4 + place]
                got = (byte >> step % 2 * 4 & 15).to(torch.int8) - 8
            else:
                got = (values[:, column // 2] >> column % 2 * 4 & 15).to(torch.int8) - 8
            assert torch.equal(got, q[:, column]), column
        first += max(blocks, 1) * 64


@BITS
def test_a_group_of_zeros_and_the_smallest_numbers(bits):
    weight = torch.zeros(3, 128)
    weight[1, 64:] = 1e-44
    weight[2, 5] = 3e38
    back = dequantize(quantize(weight, bits))
    assert torch.equal(back[0], weight[0]) and back.isfinite().all()
    torch.testing.assert_close(back[2], weight[2], rtol=2.0**-8, atol=0)  # as the scale is rounded


@BITS
def test_steps_too_coarse_for_their_group(bits):
    """A scale below 2^-126 is rounded so far that its group may lie beyond the limits of q."""
    smallest = 2.0**-133  # of bfloat16
    most = torch.arange(256.0)[:, None] * smallest
    weight = most * torch.linspace(-1, 0.9, 64)
    quantized = quantize(torch.cat((weight, -weight)), bits)
    assert ((dequantize(quantized) - torch.cat((weight, -weight))).abs() <= 64 * smallest).all()
    q = numbers(quantized.values)
    assert q.abs().max() == (127 if bits == 8 else 8)


@BITS
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_norms_of_rows_and_of_what_they_lose(bits, name):
    weight = Inputs("cpu", torch.bfloat16).weight(5000, 130)
    weight[7], weight[8] = 0, weight[8] * 2.0**-120  # its squares are no float32
    error, norm = torch.empty(5000), torch.empty(5000)
    with use_backend(name):
        quantized = quantize(weight, bits, error=error, norm=norm)
    lost = weight.double() - dequantize(quantized, torch.float64)
    torch.testing.assert_close(error, lost.norm(dim=1).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm, weight.double().norm(dim=1).float(), rtol=1e-5, atol=0)
    assert error[7] == norm[7] == 0 and norm[8] > 0


def test_offset_and_other_dtypes():
    """w = scale · q + offset, group by group, the last one short."""
    inputs = Inputs("cpu")
    q = inputs.integers(-8, 8, 3, 130).to(torch.int8)
    scale, offset = inputs.randn(3, 2), inputs.randn(3, 2)
    quantized = QuantizedWeight(stored(q, 4), scale, 128, offset)
    group = torch.arange(130) // 128
    assert torch.equal(dequantize(quantized), q * scale[:, group] + offset[:, group])
    assert dequantize(quantized, torch.bfloat16).dtype == torch.bfloat16


def test_bfloat16_activations_near_the_largest_are_kept():
    x = Inputs("cpu", torch.bfloat16).randn(40, 200)
    x32, kept = x.float(), rounded(x).float()
    largest = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x32.split(64, 1)], 1)
    near = x32.abs() >= largest / 128
    assert torch.equal(kept[near], x32[near]) and near.float().mean() > 0.9
    assert ((kept - x32).abs() <= largest * 2.0**-15).all()


def test_float32_activations_are_within_one_step():
    x = Inputs("cpu").randn(40, 200)
    x[:, 7] = 1.99999  # just below a power of two
    assert ((rounded(x) - x).abs() <= 2.0**-14 * x.abs().amax(1, keepdim=True)).all()


@BITS
def test_product_in_parts_equals_the_whole(monkeypatch, bits):
    inputs = Inputs("cpu")
    x, weight = inputs.randn(3, 130), quantize(inputs.weight(50, 130), bits)._replace(offset=inputs.randn(50, 3))
    whole = product(x, weight)
    monkeypatch.setattr("layerskip_kernels.reference.quantized._ROWS_AT_ONCE", 7)
    torch.testing.assert_close(product(x, weight), whole)
    assert product(x[:0], weight).shape == (0, 50)


def test_product_is_that_of_the_dequantized_weight():
    inputs = Inputs("cpu", torch.bfloat16)
    x, weight = inputs.randn(7, 500), inputs.weight(33, 500)
    for bits, error in ((8, 0.008), (4, 0.12)):
        quantized = quantize(weight, bits)
        torch.testing.assert_close(product(x, quantized), F.linear(x.float(), dequantize(quantized)), atol=1e-4, rtol=0)
        assert (product(x, quantized) - F.linear(x.float(), weight.float())).std() < error


def arguments(**changes):
    return dict(weight=torch.ones(3, 64), bits=4, group=64) | changes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=[1.0]), TypeError, "weight: expected a tensor, got list"),
        (dict(weight=torch.ones(64)), ValueError, r"weight: shape \[64\], expected \[\*, \*\]"),
        (dict(weight=torch.ones(3, 64).int()), TypeError, "weight: dtype int32, choose float32 or float16 or bfloat16"),
        (dict(weight=torch.ones(3, 63)), ValueError, "weight: 63 columns, 4 bits need an even number"),
        (dict(weight=torch.full((3, 64), torch.nan)), ValueError, "weight: NaN or infinity in row 0, expected finite"),
        (dict(bits=3), ValueError, "bits=3: choose 8 or 4"),
        (dict(group=32), ValueError, "group=32: choose a multiple of 64"),
        (dict(group=100), ValueError, "group=100: choose a multiple of 64"),
        (dict(group=64.0), ValueError, "group=64.0: choose a multiple of 64"),
        (dict(error=[0.0]), TypeError, "error: expected a tensor, got list"),
        (dict(error=torch.ones(4)), ValueError, r"error: shape \[4\], expected \[3\]"),
        (dict(norm=torch.ones(3).double()), TypeError, "norm: dtype float64, choose float32"),
        (dict(norm=torch.ones(3, device="meta")), ValueError, "norm: on meta, expected cpu"),
    ],
)
def test_quantize_rejects(change, error, message):
    assert_rejects(quantize, arguments(**change), error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(values=torch.ones(5, 64)), TypeError, r"weights\.values: dtype float32, choose int8 or uint8"),
        (dict(values=torch.ones(5, 64, dtype=torch.uint8)), ValueError, r"weights\.values: 4 bits, a weight of shape "),
        (dict(scale=torch.ones(5, 2)), ValueError, r"weights\.scale: shape \[5, 2\], expected \[5, 1\]"),
        (dict(scale=torch.ones(5, 1).double()), TypeError, r"weights\.scale: dtype float64, choose bfloat16 or f"),
        (dict(offset=torch.ones(5)), ValueError, r"weights\.offset: shape \[5\], expected \[5, 1\]"),
        (dict(offset=torch.ones(5, 1, device="meta")), ValueError, r"weights\.offset: on meta, expected cpu"),
        (dict(group=65), ValueError, r"weights\.group=65: choose a multiple of 64"),
    ],
)
def test_ops_reject(change, error, message):
    x, weight = torch.ones(2, 64), quantize(torch.ones(5, 64), 8)
    assert_rejects(small_linear, dict(x=x, weights=weight._replace(**change)), error, message)
    head = dict(hidden=x, norm_weight=torch.ones(64), lm_head=weight._replace(**change), eps=1e-5)
    assert_rejects(exit_head, head, error, message.replace("weights", "lm_head"))


def test_weights_of_one_pass_are_of_one_kind():
    x, weight = torch.ones(2, 64), torch.ones(5, 64)
    few = [quantize(weight, 8), quantize(weight, 4)]
    assert_rejects(
        small_linear, dict(x=x, weights=few), TypeError, r"weights: \[0\] in 8 bits, \[1\] in 4 bits, expected all"
    )
    assert_rejects(
        small_linear, dict(x=x, weights=[few[0], weight]), TypeError, r"weights: .* \[1\] a tensor, expected"
    )


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_without_it_say_so(name, monkeypatch):
    module = registry._backend(name)
    device = torch.device("cuda")
    monkeypatch.setattr(module, "why_unavailable", lambda: None)  # as with a GPU
    monkeypatch.setattr(module, "why_unsupported", lambda op, **_: None)
    monkeypatch.setattr(module, "OPS", dict.fromkeys(registry.DECODE_OPS))
    for op in ("small_linear", "exit_head", "decoder_stack"):
        assert registry.why_not(name, op, device, torch.bfloat16) is None
        reason = registry.why_not(name, op, device, torch.bfloat16, quantized=True)
        assert reason == "it takes no quantized weights"
    assert registry.why_not(name, "swiglu", device, torch.bfloat16, quantized=True) is None
    with pytest.raises(registry.BackendUnavailable, match="it takes no quantized weights"):
        registry.resolve("small_linear", device, torch.bfloat16, name, quantized=True)


def test_tracing_is_refused_in_one_sentence():
    weight = quantize(torch.ones(5, 64), 8)
    with pytest.raises(Exception, match="weights: quantized weights do not trace"):
        torch.compile(lambda x: small_linear(x, weight), backend="eager", fullgraph=True)(torch.ones(2, 64))


def test_layers_of_mixed_kinds_are_refused():
    from test_decoder_stack import case, decoder_stack

    args = case(Inputs("cpu"))
    one = args["layers"][0]
    args["layers"] = DecoderLayers([one._replace(k=quantize(one.k, 8))])
    for name in ("k_cache", "v_cache"):
        args[name] = args[name][:1]
    with pytest.raises(TypeError, match=r"layers\[0\]: q a tensor, k in 8 bits, v a tensor, expected all of one kind"):
        decoder_stack(**args)
