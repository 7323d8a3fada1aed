"""The CUDA kernels on the CPU: the ops' own tests, run by tests/native/cuda_shim.

The shim takes the place of the CUDA library when a process starts, so the tests run in processes of their own.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_shim import VARIABLE, build, run

from layerskip_kernels.native import cuda_library
from layerskip_kernels.native.cuda import launch

TESTS = Path(__file__).parent
GROUPS = {
    "products": ("small_linear", "exit_head", "exit_head_penalty"),
    "others": (
        *("rms_norm", "swiglu", "rope_append", "kv_rollback"),
        *("verify_attention", "verify_tokens", "verify_rejection", "kernels_decode", "decode_glue"),
    ),
}
# float16 takes the same path as bfloat16 here, and these are the tests with the most launches.
LEFT_OUT = "not (test_a_row_depends_on_itself_alone and float16)"


@pytest.fixture(scope="session")
def folder():
    return build("_cuda")


@pytest.fixture(scope="session")
def shim(folder):
    (path,) = folder.glob("_cuda*.so")
    return str(path)


@pytest.mark.parametrize("group", GROUPS)
def test_passes_its_tests(shim, group):
    files = [f"tests/test_{op}.py" for op in GROUPS[group]]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend", "cuda", "-k", LEFT_OUT, *files],
        cwd=TESTS.parent,
        env={**os.environ, VARIABLE: shim},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout


def test_every_op_is_run():
    library, _ = cuda_library()
    if library is not None:
        from layerskip_kernels.native.cuda import OPS

        assert {op for ops in GROUPS.values() for op in ops} == {
            *OPS,
            "kernels_decode",
            "decode_glue",
            "exit_head_penalty",
        }


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
