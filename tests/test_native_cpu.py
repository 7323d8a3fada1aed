"""The native CPU backend beyond what every backend's op tests cover: variants, threads, forks, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerskip_kernels import reference
from layerskip_kernels.native import _cpu
from layerskip_kernels.native.cpu import OPS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
VARIANTS = [name for name in _cpu.build_info()["variants"] if not _cpu.why_variant_unsupported(name)]
EPS = 1e-5


@pytest.fixture(params=VARIANTS)
def variant(request):
    before = _cpu.active_variant()
    _cpu.set_variant(request.param)
    yield request.param
    _cpu.set_variant(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(m, n, c, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight, norm, bias, residual = (
        torch.randn(*shape, generator=g) for shape in ((m, c), (n, c), (c,), (n,), (m, n))
    )
    return [t.to(dtype) for t in (x, weight / c**0.5, norm, bias, residual)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, c", [(1, 1, 1), (2, 83, 7), (5, 33, 769), (9, 101, 31), (66, 12, 100)])
def test_each_variant_matches_the_reference(variant, m, n, c, dtype):
    x, weight, norm, bias, residual = inputs(m, n, c, dtype)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(OPS["rms_norm"](x, norm, EPS), reference.OPS["rms_norm"](x, norm, EPS), **tolerance)
    for extras in ({}, {"bias": bias}, {"residual": residual}, {"norm": (norm, EPS), "bias": bias}):
        torch.testing.assert_close(
            OPS["small_linear"](x, weight, **extras), reference.OPS["small_linear"](x, weight, **extras), **tolerance
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [5, 64, 769])
def test_a_row_is_the_same_alone_in_any_batch_and_on_any_threads(variant, threads, c, dtype):
    most = 300
    x, weight, norm, bias, residual = inputs(most, 53, c, dtype)
    extras = {"bias": bias, "norm": (norm, EPS)}
    threads(1)
    alone = torch.cat(
        [OPS["small_linear"](x[i : i + 1], weight, residual=residual[i : i + 1], **extras) for i in range(most)]
    )
    for count in (1, 2, 5):
        threads(count)
        for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 32, 33, 50, 64, 65, 67, most):
            got = OPS["small_linear"](x[:m], weight, residual=residual[:m], **extras)
            assert torch.equal(got, alone[:m]), (count, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_equals_its_parts(variant, dtype):
    x, weight, norm, bias, residual = inputs(5, 47, 131, dtype)
    normed = OPS["rms_norm"](x, norm, EPS)
    plain = OPS["small_linear"](normed, weight, bias=bias)
    assert torch.equal(OPS["small_linear"](x, weight, bias=bias, norm=(norm, EPS)), plain)
    assert torch.equal(OPS["small_linear"](normed, weight, bias=bias, residual=residual), residual + plain)
    first, second = OPS["small_linear"](x, [weight[:20], weight[20:]], bias=[bias[:20], None], norm=(norm, EPS))
    assert torch.equal(first, plain[:, :20])
    assert torch.equal(second, OPS["small_linear"](normed, weight[20:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_enough_for_several_tasks(variant, threads, dtype):
    """Both ops cut their work into tasks only above some size."""
    x, weight, norm, *_ = inputs(40, 1000, 1025, dtype)
    results = []
    for count in (1, 3):
        threads(count)
        total = x.clone()
        results.append((OPS["rms_norm"](x, norm, EPS, residual=total), total, OPS["small_linear"](x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.testing.assert_close(results[0][2], reference.OPS["small_linear"](x, weight), rtol=3e-2, atol=3e-2)


def test_conversions_cover_every_half(variant):
    """A copy through rms_norm's residual add: x + 0 rounds to x for every bit pattern, NaN staying NaN."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(8, -1).clone()
        total = torch.zeros_like(every)
        OPS["rms_norm"](every, torch.ones(every.shape[1], dtype=dtype), EPS, residual=total)
        assert torch.equal(total.isnan(), every.isnan())
        number = ~every.isnan()
        assert torch.equal(total[number], every[number])


def test_rounding_is_to_nearest_even(variant):
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(4, 1003, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
        a[:, ::7] *= 2.0**-10  # ties and subnormal results
        a[:, ::5] *= 2.0**-14
        b[:, ::5] *= 2.0**-14
        total = b.clone()
        OPS["rms_norm"](a, torch.ones(1003, dtype=dtype), EPS, residual=total)
        assert torch.equal(total, (a.float() + b.float()).to(dtype))


def test_several_callers_at_once(threads):
    threads(3)
    x, weight, *_ = inputs(7, 700, 513, torch.float32)
    expected = OPS["small_linear"](x, weight)
    with ThreadPoolExecutor(4) as callers:
        jobs = [callers.submit(lambda: [OPS["small_linear"](x, weight) for _ in range(20)]) for _ in range(4)]
        assert all(torch.equal(result, expected) for job in jobs for result in job.result())


def test_works_in_the_child_of_a_fork_and_ends_cleanly():
    """Without torch, whose own forked children do not always end cleanly."""
    code = """
import importlib.util, os, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cpu)

x, w, y = np.ones((2, 4096), np.float32), np.ones((300, 4096), np.float32), np.zeros((2, 300), np.float32)
def check():
    y[:] = 0
    weights = (w.ctypes.data, 4096, 300, 0, y.ctypes.data, 300)
    _cpu.small_linear(x.ctypes.data, 4096, 2, 4096, weights, 0, 0.0, 0, 0, 0, 3, ())
    assert (y == 4096).all() and _cpu.pool_size() == 2
check()
child = os.fork()
check()
if child == 0:
    sys.exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", code, _cpu.__file__], timeout=120, capture_output=True, text=True)
    assert result.returncode == 7, result.stderr


class Wrapped(torch.Tensor):
    pass


def misaligned(x):
    return torch.frombuffer(bytearray(x.numel() * 4 + 1), dtype=torch.float32, offset=1).view_as(x)


@pytest.mark.parametrize(
    "bad, error, words",
    [
        (lambda x: x.as_subclass(Wrapped), TypeError, "Wrapped"),
        (lambda x: FakeTensorMode().from_tensor(x), TypeError, "FakeTensor"),
        (lambda x: x.to("meta"), ValueError, "meta"),
        (lambda x: x.clone().requires_grad_(), ValueError, "requires_grad"),
        (lambda x: x.T.contiguous().T, ValueError, "stride"),
        (misaligned, ValueError, "multiple of 4 bytes"),
    ],
)
def test_refuses_what_has_no_plain_memory(bad, error, words):
    x, weight, *_ = inputs(3, 5, 8, torch.float32)
    for call in (lambda: OPS["rms_norm"](bad(x), weight[0], EPS), lambda: OPS["small_linear"](x, bad(weight))):
        with pytest.raises(error, match=words) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


def test_parameters_are_plain_memory_where_no_gradient_is_asked_for():
    x, weight, *_ = inputs(3, 5, 8, torch.float32)
    with torch.no_grad():
        assert torch.equal(OPS["small_linear"](x, torch.nn.Parameter(weight)), OPS["small_linear"](x, weight))


def test_unknown_variant_lists_the_choices():
    with pytest.raises(ValueError, match="variant='sse9': choose one of scalar"):
        _cpu.set_variant("sse9")


def test_empty_shapes(variant):
    x, weight, norm, *_ = inputs(3, 5, 8, torch.float32)
    assert OPS["small_linear"](x[:0], weight).shape == (0, 5)
    assert OPS["small_linear"](x, weight[:0]).shape == (3, 0)
    assert torch.equal(OPS["small_linear"](x[:, :0], weight[:, :0]), torch.zeros(3, 5))
    assert OPS["rms_norm"](x[:0], norm, EPS).shape == (0, 8)
