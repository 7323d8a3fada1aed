"""The Triton kernels on CPU tensors: the ops' own tests and the decode loop, in Triton's interpreter.

An environment variable chooses the interpreter when kernels are defined, so each file runs in processes of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_kernels import triton

TESTS = Path(__file__).parent


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )


OTHER_FILES = (
    *("exit_head_penalty", "kernels_decode"),
    *("triton_attention", "triton_draw", "triton_library", "triton_philox"),
)


@pytest.mark.parametrize("name", [*sorted(triton.OPS), *OTHER_FILES])
def test_passes_its_tests(name):
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", "--backend", "triton"]
    run = interpreted("-m", "pytest", *options, f"tests/test_{name}.py")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout


def test_needs_no_cuda_library():
    """The backend runs, and a decoder binds it, where the package was built without CUDA."""
    run = interpreted("-c", NO_CUDA)
    assert run.returncode == 0, run.stderr[-2000:]


NO_CUDA = """
import torch
import layerskip_kernels as lk
from layerskip_kernels import native, registry

native.cuda_library = lambda: (None, "not built")
assert next(row for row in lk.backends() if row.name == "triton").available
ops = registry.bind(torch.device("cpu"), torch.float32, "triton")
assert set(ops.backends.values()) == {"triton", "composed"}, ops.backends
"""


def test_without_triton_the_reason_is_named():
    hide = "import sys; sys.modules['triton'] = None\n"
    ask = "import layerskip_kernels as lk; print({r.name: r.reason for r in lk.backends()}['triton'])"
    run = subprocess.run([sys.executable, "-c", hide + ask], cwd=TESTS.parent, capture_output=True, text=True)
    assert run.stdout.strip() == "the package triton is not installed", run.stderr[-2000:]
