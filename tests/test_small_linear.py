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
    dtype_name,
    num_threads,
    reference,
    same_bits,
    strided,
)
from tolerances import assert_close

from layerskip_kernels.ops import rms_norm, small_linear, swiglu

OP = "small_linear"
EPS = 1e-5
SHAPES = [(1, 1, 1), (1, 7, 83), (7, 83, 769), (16, 769, 83), (3, 33, 5125), (64, 130, 64)]  # M, N, C


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_torch(backend, dtype, shape):
    rows, outputs, width = shape
    inputs = Inputs(backend.device, dtype)
    x, w, b = inputs.randn(rows, width), inputs.weight(outputs, width), inputs.randn(outputs)
    assert_close(small_linear(x, w), F.linear(x.double(), w.double()).to(dtype))
    assert_close(small_linear(x, w, bias=b), F.linear(x.double(), w.double(), b.double()).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_whole_numbers_are_exact(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    x, w, b = inputs.integers(-2, 3, 5, 61), inputs.integers(-1, 2, 37, 61), inputs.integers(-3, 4, 37)
    assert torch.equal(small_linear(x, w, bias=b), F.linear(x.double(), w.double(), b.double()).to(dtype))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_list_of_weights(backend, dtype, norm):
    """Odd sizes, a missing bias, strided everything, outputs with canaries."""
    inputs = Inputs(backend.device, dtype)
    x = strided(inputs.randn(5, 83))
    weights = [strided(inputs.weight(n, 83)) for n in (7, 1, 40)]
    bias = [inputs.randn(7), None, inputs.randn(40)]
    norm = (inputs.norm(83), EPS) if norm else None
    outs = [Guarded((5, n), dtype, backend.device) for n in (7, 1, 40)]
    expected, *_ = reference(small_linear, x, weights, bias=bias, norm=norm)

    results = small_linear(x, weights, bias=bias, norm=norm, out=[o.view for o in outs])

    assert len(results) == 3
    for result, out, wanted in zip(results, outs, expected, strict=True):
        assert result is out.view
        assert_close(result, wanted)
        out.assert_surroundings_unchanged()


@pytest.mark.parametrize("rows", [6, 20])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_residual_rounds_after_the_linear_and_after_the_sum(backend, dtype, rows):
    """residual + linear, the sum of two rounded values, is what the separate operations give."""
    inputs = Inputs(backend.device, dtype)
    x, w, b = inputs.randn(rows, 83), inputs.weight(41, 83), inputs.randn(41)
    residual = strided(inputs.randn(rows, 41))
    expected = residual + small_linear(x, w, bias=b)
    stream = Guarded.of(residual)
    fresh = small_linear(x, w, bias=b, residual=residual)
    result = small_linear(x, w, bias=b, residual=stream.view, out=stream.view)
    assert result is stream.view
    stream.assert_surroundings_unchanged()
    if backend.name == "reference":  # torch's product may differ in the last bit between two calls
        assert_close(fresh, expected)
        assert_close(result, expected)
    else:
        assert torch.equal(fresh, expected)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_norm_with_residual(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    x, w, residual = inputs.randn(3, 96), inputs.weight(17, 96), inputs.randn(3, 17)
    norm = (inputs.norm(96), EPS)
    expected, *_ = reference(small_linear, x, w, norm=norm, residual=residual)
    assert_close(small_linear(x, w, norm=norm, residual=residual), expected)


@pytest.mark.parametrize("rows", [0, 1, 5, 9, 33])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_gated_equals_swiglu_of_both(backend, dtype, rows):
    """To the bit, whatever rounds in between; a bias on one side, strided weights, rows that fill no tile."""
    inputs = Inputs(backend.device, dtype)
    x, weights = inputs.randn(rows, 83), [strided(inputs.weight(41, 83)), inputs.weight(41, 83)]
    for more in (dict(), dict(norm=(inputs.norm(83), EPS), bias=[None, inputs.randn(41)])):
        expected = swiglu(*small_linear(x, weights, **more))
        assert same_bits(small_linear(x, weights, **more, swiglu=True), expected)
        out = Guarded((rows, 41), dtype, backend.device)
        assert small_linear(x, weights, **more, swiglu=True, out=out.view) is out.view
        assert same_bits(out.view, expected)
        out.assert_surroundings_unchanged()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_gated_equals_torch(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    x, weights = inputs.randn(6, 256), [inputs.weight(40, 256), inputs.weight(40, 256)]
    gate, up = (F.linear(x.double(), w.double()).to(dtype).double() for w in weights)
    assert_close(small_linear(x, weights, swiglu=True), (F.silu(gate) * up).to(dtype))


def test_large_values_stay_finite_until_the_rounding(backend):
    """Partial sums beyond float16's range cancel: they must be float32."""
    x = torch.tensor([[6e4, 6e4, -6e4, -6e4, 1.0]], dtype=torch.float16, device=backend.device)
    w = torch.ones(3, 5, dtype=torch.float16, device=backend.device)
    assert torch.equal(small_linear(x, w).cpu(), torch.ones(1, 3, dtype=torch.float16))


def test_no_rows(backend):
    inputs = Inputs(backend.device)
    assert small_linear(inputs.randn(0, 16), inputs.randn(4, 16)).shape == (0, 4)
    a, b = small_linear(inputs.randn(0, 16), [inputs.randn(4, 16), inputs.randn(3, 16)])
    assert (a.shape, b.shape) == ((0, 4), (0, 3))


@pytest.mark.parametrize("shape", [(83, 769), (40, 5125), (768, 256)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_a_row_depends_on_itself_alone(kernels, dtype, shape):
    """Not on the other rows, how many there are, the threads, the strides, or the weights it shares a pass with."""
    outputs, width = shape
    inputs = Inputs(kernels.device, dtype)
    x, w, b = inputs.randn(33, width), inputs.weight(outputs, width), inputs.randn(outputs)
    other = inputs.weight(24, width)
    alone = torch.cat([small_linear(x[i : i + 1], w, bias=b) for i in range(33)])
    poisoned = x.clone()
    poisoned[1::2] = float("nan")
    for threads in (1, 2):
        with num_threads(threads):
            for rows in (*range(2, 14), 16, 33):
                assert same_bits(small_linear(x[:rows], w, bias=b), alone[:rows]), f"{rows} rows, {threads} threads"
            assert same_bits(small_linear(strided(x), strided(w), bias=b), alone)
            assert same_bits(small_linear(poisoned, w, bias=b)[::2], alone[::2])
            assert same_bits(small_linear(x[:7], [other, w], bias=[None, b])[1], alone[:7])
            assert same_bits(small_linear(x[:7], w, bias=b, out=torch.empty_like(alone[:7])), alone[:7])


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_more_rows_than_one_pass_over_the_weights_takes(kernels, dtype):
    inputs = Inputs(kernels.device, dtype)
    x, weights = inputs.randn(131, 96), [inputs.weight(40, 96), inputs.weight(33, 96)]
    residual = inputs.randn(131, 40)
    together = small_linear(x, weights), [small_linear(x, weights[0], residual=residual)]
    for rows in (slice(0, 64), slice(64, 131), slice(130, 131)):
        for found, w in zip(together[0], weights):
            assert same_bits(found[rows], small_linear(x[rows], w))
        assert same_bits(together[1][0][rows], small_linear(x[rows], weights[0], residual=residual[rows]))


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_fused_norm_equals_separate_norm(kernels, dtype, rows):
    inputs = Inputs(kernels.device, dtype)
    x, w, weight = inputs.randn(rows, 769), inputs.weight(83, 769), inputs.norm(769)
    separate = small_linear(rms_norm(x, weight, EPS), w)
    assert same_bits(small_linear(x, w, norm=(weight, EPS)), separate)
    assert same_bits(small_linear(x, [w, w], norm=(weight, EPS))[1], separate)


def arguments():
    inputs = Inputs("cpu")
    x, weights, bias = inputs.randn(3, 16), inputs.randn(5, 16), inputs.randn(5)
    residual, out = inputs.randn(3, 5), inputs.randn(3, 5)
    return dict(x=x, weights=weights, bias=bias, norm=(inputs.norm(16), EPS), residual=residual, out=out)


def list_arguments():
    inputs = Inputs("cpu")
    weights, bias = [inputs.randn(5, 16), inputs.randn(7, 16)], [inputs.randn(5), inputs.randn(7)]
    return dict(x=inputs.randn(3, 16), weights=weights, bias=bias, out=[inputs.randn(3, 5), inputs.randn(3, 7)])


@bad_tensors("x", "bias", "norm[0]", "residual", "out")
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(small_linear, arguments(), path, defect)


@bad_tensors("weights[0]", "weights[1]", "bias[1]", "out[1]")
def test_rejects_tensor_of_a_list(path, defect):
    assert_rejects_tensor(small_linear, list_arguments(), path, defect)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(norm=(torch.ones(16), 0.0)), ValueError, r"norm\[1\]=0.0: must be > 0"),
        (dict(norm=torch.ones(16)), TypeError, r"norm: expected \(weight, eps\), got Tensor"),
        (dict(norm=(torch.ones(16),)), TypeError, r"norm: expected \(weight, eps\), got tuple"),
        (dict(weights=[], bias=None), ValueError, "weights: an empty list"),
        (dict(weights=None), TypeError, "weights: expected a tensor or a list of tensors, got NoneType"),
        (dict(weights=torch.ones(5, 17)), ValueError, r"weights: shape \[5, 17\], expected \[\*, 16\]"),
        (dict(bias=[torch.ones(5)]), TypeError, "bias: expected a tensor, got list"),
        (dict(out=[torch.ones(3, 5)]), TypeError, "out: expected a tensor, got list"),
        (dict(swiglu=True), ValueError, r"swiglu: needs weights \[gate, up\] of one shape, got \[5, 16\]"),
    ],
)
def test_rejects(change, error, message):
    assert_rejects(small_linear, {**arguments(), **change}, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(residual=torch.ones(3, 5)), ValueError, "residual: needs a single weight, got a list"),
        (dict(swiglu=True), ValueError, r"swiglu: needs weights \[gate, up\] of one shape, got \[5, 16\], \[7, 16\]"),
        (dict(bias=[None]), ValueError, "bias: 1 entries, expected 2 like weights"),
        (dict(bias=torch.ones(5)), TypeError, "bias: expected a list like weights, got Tensor"),
        (dict(out=[torch.ones(3, 5)]), ValueError, "out: 1 tensors, expected 2 like weights"),
        (dict(out=torch.ones(3, 12)), TypeError, "out: expected a list like weights, got Tensor"),
    ],
)
def test_rejects_with_a_list(change, error, message):
    assert_rejects(small_linear, {**list_arguments(), **change}, error, message)
