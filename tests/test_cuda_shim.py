"""The CUDA kernels on the CPU: the ops' own tests, run by tests/native/cuda_shim.

The shim takes the place of the CUDA library when a process starts, so the tests run in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_shim import VARIABLE, build

from layerskip_kernels.native import cuda_library

TESTS = Path(__file__).parent
GROUPS = {
    "rows": ("rms_norm", "swiglu", "rope_append", "kv_rollback"),
    "attention": ("verify_attention",),
    "products": ("small_linear", "exit_head"),
    "tokens": ("verify_tokens", "verify_rejection"),
}


@pytest.fixture(scope="session")
def shim():
    (path,) = build("_cuda").glob("_cuda*.so")
    return str(path)


@pytest.mark.parametrize("group", GROUPS)
def test_passes_its_tests(shim, group):
    files = [f"tests/test_{op}.py" for op in GROUPS[group]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend", "cuda", *files],
        cwd=TESTS.parent,
        env={**os.environ, VARIABLE: shim},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout


def test_every_op_is_run():
    library, _ = cuda_library()
    if library is not None:
        from layerskip_kernels.native.cuda import OPS

        assert {op for ops in GROUPS.values() for op in ops} == set(OPS)
