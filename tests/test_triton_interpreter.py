"""The Triton kernels on CPU tensors: the ops' own tests and the decode loop, in Triton's interpreter.

An environment variable chooses the interpreter when kernels are defined.
"""

import os
import subprocess
import sys

import pytest
from op_tests import GROUPS, files_of, pass_tests

from layerskip_kernels import triton

INTERPRET = {"TRITON_INTERPRET": "1"}


@pytest.mark.parametrize("group", GROUPS["triton"])
def test_passes_its_tests(group):
    pass_tests("triton", group, INTERPRET, "-n", "2")


def test_every_op_is_run():
    assert {*triton.OPS} < files_of("triton")


def test_needs_no_cuda_library():
    """The backend runs, and a decoder binds it, where the package was built without CUDA."""
    environment = os.environ | INTERPRET
    run = subprocess.run([sys.executable, "-c", NO_CUDA], capture_output=True, text=True, env=environment)
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
    run = subprocess.run([sys.executable, "-c", hide + ask], capture_output=True, text=True)
    assert run.stdout.strip() == "the package triton is not installed", run.stderr[-2000:]
