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
    same_bits,
    strided,
)
from tolerances import assert_close

from layerskip_kernels.ops import swiglu

OP = "swiglu"


@pytest.mark.parametrize("shape", [(1, 1), (7, 83), (3, 769), (2, 5125), (0, 8)])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_torch(backend, dtype, shape):
    inputs = Inputs(backend.device, dtype)
    gate, up = inputs.randn(*shape, scale=3), inputs.randn(*shape)
    assert_close(swiglu(gate, up), (F.silu(gate.double()) * up.double()).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_strided_views_and_canaries(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    gate, up = strided(inputs.randn(5, 83)), strided(inputs.randn(5, 83))
    out = Guarded((5, 83), dtype, backend.device)
    assert swiglu(gate, up, out=out.view) is out.view
    assert_close(out.view, (F.silu(gate.double()) * up.double()).to(dtype))
    out.assert_surroundings_unchanged()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_writes_over_its_inputs(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    gate, up = inputs.randn(3, 83), inputs.randn(3, 83)
    expected = swiglu(gate, up)
    over_gate, over_up = gate.clone(), up.clone()
    assert torch.equal(swiglu(over_gate, up, out=over_gate), expected)
    assert torch.equal(swiglu(gate, over_up, out=over_up), expected)


def test_far_out_gates(backend):
    """exp must neither overflow to NaN nor turn a gate of -infinity's limit into anything but zero."""
    gate = torch.tensor([[-1e4, -200.0, -89.0, 0.0, 89.0, 200.0, 1e4]], device=backend.device)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 178.0, 400.0, 2e4]])
    assert_close(swiglu(gate, torch.full_like(gate, 2.0)), expected)


@pytest.mark.parametrize("width", [83, 5125])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_an_element_depends_on_itself_alone(kernels, dtype, width):
    """Not on its row's neighbours, its place in a vector register, or the threads."""
    inputs = Inputs(kernels.device, dtype)
    gate, up = inputs.randn(9, width, scale=3), inputs.randn(9, width)
    alone = torch.cat([swiglu(gate[i : i + 1], up[i : i + 1]) for i in range(9)])
    for threads in (1, 2):
        with num_threads(threads):
            assert same_bits(swiglu(gate, up), alone)
            assert same_bits(swiglu(strided(gate), strided(up)), alone)
            assert same_bits(swiglu(gate[:, 3:], up[:, 3:]), alone[:, 3:])
    poisoned = gate.clone()
    poisoned[:, 1::2] = float("nan")
    assert same_bits(swiglu(poisoned, up)[:, ::2], alone[:, ::2])


def arguments():
    inputs = Inputs("cpu")
    return dict(gate=inputs.randn(3, 16), up=inputs.randn(3, 16), out=inputs.randn(3, 16))


@bad_tensors("gate", "up", "out")
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(swiglu, arguments(), path, defect)


def test_rejects_other_shapes():
    short = {**arguments(), "up": torch.ones(2, 16)}
    assert_rejects(swiglu, short, ValueError, r"up: shape \[2, 16\], expected \[3, 16\]")
