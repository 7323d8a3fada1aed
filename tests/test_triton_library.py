"""The Triton kernels under torch.library and torch.compile, on the calls of test_ops_library."""

import pytest
import test_ops_library as calls
import torch
from op_inputs import Inputs, same_bits, tensors
from torch.utils._pytree import tree_map_only

import layerskip_kernels as lk
from layerskip_kernels import ops, registry, triton

BACKEND = "triton"
INTERPRETED = registry.why_not("triton", "swiglu", torch.device("cpu"), torch.float32) is None
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
every_case = pytest.mark.parametrize(("op", "number"), [case for case in calls.CASES if case[0] in triton.OPS])


@pytest.fixture(autouse=True)
def _triton():
    torch._dynamo.reset()
    with lk.use_backend("triton"):
        yield


def case(op, number):
    """Arguments of a call, the same numbers every time."""
    arguments = list(getattr(calls, op)(Inputs("cpu")))[number]
    return tree_map_only(torch.Tensor, lambda t: t.detach().to(DEVICE).requires_grad_(t.requires_grad), arguments)


@every_case
def test_opcheck(monkeypatch, op, number):
    args, kwargs = calls.library_arguments(monkeypatch, op, *case(op, number))
    torch.library.opcheck(getattr(torch.ops.layerskip_kernels, op).default, args, kwargs)


@every_case
def test_compiles_to_the_same(op, number):
    args, kwargs = case(op, number)
    function = getattr(ops, op)
    expected = function(*args, **kwargs)
    compiled_args, compiled_kwargs = case(op, number)
    compiled = torch.compile(lambda *a, **k: function(*a, **k), fullgraph=True, backend="aot_eager")
    result = compiled(*compiled_args, **compiled_kwargs)
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        assert same_bits(a, b)
    for a, b in zip(tensors((compiled_args, compiled_kwargs)), tensors((args, kwargs)), strict=True):
        assert same_bits(a, b), "compiled and eager call left an argument different"
