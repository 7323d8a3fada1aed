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

from layerskip_kernels.ops import rms_norm

OP = "rms_norm"
EPS = 1e-5
SHAPES = [(1, 1), (7, 83), (3, 769), (2, 5125)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_torch(backend, dtype, shape):
    inputs = Inputs(backend.device, dtype)
    x, weight = inputs.randn(*shape), inputs.norm(shape[1])
    expected = F.rms_norm(x.double(), (shape[1],), weight.double(), EPS).to(dtype)
    assert_close(rms_norm(x, weight, EPS), expected)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_strided_views_and_canaries(backend, dtype, residual):
    inputs = Inputs(backend.device, dtype)
    x, weight = strided(inputs.randn(5, 83)), inputs.norm(83)
    out = Guarded((5, 83), dtype, backend.device)
    stream = Guarded.of(inputs.randn(5, 83)) if residual else None
    expected, _, after = reference(rms_norm, x, weight, EPS, residual=stream.view if residual else None)
    before = x.clone()

    result = rms_norm(x, weight, EPS, residual=stream.view if residual else None, out=out.view)

    assert result is out.view
    assert_close(result, expected)
    out.assert_surroundings_unchanged()
    assert torch.equal(x, before)
    if residual:
        assert torch.equal(stream.view.cpu(), after["residual"])  # one rounded addition: exact
        stream.assert_surroundings_unchanged()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_residual_is_the_norm_of_the_rounded_sum(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    x, stream, weight = inputs.randn(3, 769), inputs.randn(3, 769), inputs.norm(769)
    total = stream + x
    separate = rms_norm(total.clone(), weight, EPS)
    fused = rms_norm(x, weight, EPS, residual=stream)
    assert torch.equal(stream, total)
    assert same_bits(fused, separate)


def test_large_and_tiny_rows(backend):
    weight = torch.ones(64, device=backend.device)
    for scale in (1e-15, 1e15):
        x = Inputs(backend.device).randn(2, 64, scale=scale)
        assert_close(rms_norm(x, weight, 1e-38), F.rms_norm(x.double(), (64,), eps=1e-38).float())


def test_float16_sums_do_not_overflow(backend):
    x = torch.full((1, 512), 6e4, dtype=torch.float16, device=backend.device)
    assert_close(rms_norm(x, torch.ones_like(x[0]), EPS), torch.ones(1, 512, dtype=torch.float16))


def test_no_rows(backend):
    inputs = Inputs(backend.device)
    assert rms_norm(inputs.randn(0, 16), inputs.norm(16), EPS).shape == (0, 16)


@pytest.mark.parametrize("width", [83, 5125])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_a_row_depends_on_itself_alone(kernels, dtype, width):
    inputs = Inputs(kernels.device, dtype)
    x, weight = inputs.randn(9, width), inputs.norm(width)
    alone = torch.cat([rms_norm(x[i : i + 1], weight, EPS) for i in range(9)])
    poisoned = x.clone()
    poisoned[1::2] = float("nan")
    for threads in (1, 2):
        with num_threads(threads):
            assert same_bits(rms_norm(x, weight, EPS), alone)
            assert same_bits(rms_norm(strided(x), weight, EPS), alone)
            assert same_bits(rms_norm(poisoned, weight, EPS)[::2], alone[::2])
            assert same_bits(rms_norm(x, weight, EPS, out=x.clone()), alone)


def arguments():
    inputs = Inputs("cpu")
    x, residual, out = (inputs.randn(3, 16) for _ in range(3))
    return dict(x=x, weight=inputs.norm(16), eps=EPS, residual=residual, out=out)


@bad_tensors("x", "weight", "residual", "out")
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(rms_norm, arguments(), path, defect)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan")])
def test_rejects_eps(eps):
    assert_rejects(rms_norm, {**arguments(), "eps": eps}, ValueError, rf"eps={eps}: must be > 0")


def test_rejects_integer_activations():
    whole = {name: v.int() if isinstance(v, torch.Tensor) else v for name, v in arguments().items()}
    assert_rejects(rms_norm, whole, TypeError, "x: dtype int32, choose float32 or float16 or bfloat16")
