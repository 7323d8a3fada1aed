"""The CUDA kernels on the CPU: the ops' own tests, run by tests/native/cuda_shim."""

import contextlib
import os

import pytest
import torch
from cuda_shim import build, environment, run
from op_tests import GROUPS, files_of, pass_tests

from layerskip_kernels.native import cuda_library
from layerskip_kernels.native.cuda import launch

# float16 takes the same path as bfloat16 here, and these are the tests with the most launches.
LEFT_OUT = ("-k", "not (test_a_row_depends_on_itself_alone and float16) or bfloat16")


@pytest.fixture(scope="session")
def folder():
    return build("_cuda")


@pytest.mark.parametrize("group", GROUPS["cuda"])
def test_passes_its_tests(folder, group):
    pass_tests("cuda", group, environment(folder), *LEFT_OUT)


def test_every_op_is_run():
    library, _ = cuda_library()
    if library is not None:
        from layerskip_kernels.native.cuda import OPS

        assert {*OPS} < files_of("cuda")


def test_a_failed_launch_names_the_call(monkeypatch):
    monkeypatch.setattr(launch, "guard", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(launch, "stream", lambda index: 0)
    tensors = (torch.ones(2, 3, dtype=torch.float16), None, torch.ones(4))
    message = r"swiglu on cpu with tensors \[2, 3\] float16, \[4\] float32: out of memory"
    with pytest.raises(RuntimeError, match=message):
        launch.run("swiglu", lambda argument, stream: "out of memory", tensors, 1)
    assert launch.run("swiglu", lambda argument, stream: None, tensors, 1) is None


def test_overlapping_launches_read_nothing_too_early(folder):
    """Each kernel started before the one in front of it: only what it reads ahead, weights, may be old then."""
    output = run(str(folder / "overlap"))
    assert "verify_rejection: passed" in output and output.endswith("0 failures\n"), output


def test_no_barrier_is_missing():
    """Every kernel with a std::thread per CUDA thread, under ThreadSanitizer."""
    folder = build("races", "-DRACES=ON")
    output = run(str(folder / "races"), env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})
    assert "verify_attention" in output and "0 failures" in output
