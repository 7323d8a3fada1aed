"""The `backend` fixtures: op tests name their op in a module constant `OP` and run on every backend that has it here.

`backend` goes over all of them, `kernels` over all but the reference; both are active (`use_backend`) during the test.
`--backend NAME` keeps the tests of one backend: `TRITON_INTERPRET=1 pytest --backend triton` runs the Triton kernels on
the CPU, in Triton's interpreter; so do `test_triton_ptx.py`, as compiled, and `test_cuda_shim.py` for the CUDA kernels.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import NamedTuple

import cuda_shim
import pytest
import torch
import triton_ptx

SHIM = os.environ.get(cuda_shim.VARIABLE)
if SHIM:
    cuda_shim.install(SHIM)
TRITON_PTX = os.environ.get(triton_ptx.VARIABLE)
if TRITON_PTX:
    triton_ptx.install(int(TRITON_PTX))

import layerskip_kernels as lk  # noqa: E402
from layerskip_kernels import registry  # noqa: E402
from layerskip_kernels.native import cuda_library  # noqa: E402

# The tests' matrices are tiny, and OpenMP threads that wait for each other on a busy machine make them 20 times slower.
# What depends on the number of threads sets it itself.
torch.set_num_threads(1)


class Backend(NamedTuple):
    name: str
    device: str


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_ON_CPU = INTERPRETED or TRITON_PTX

if INTERPRETED:
    # Checking every integer operation for overflow takes two fifths of the tests' time. Wrapped addresses still show.
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)

# About Triton kernels alone, on a GPU or on the CPU as above.
TRITON_FILES = (
    "test_triton_attention.py",
    "test_triton_draw.py",
    "test_triton_library.py",
    "test_triton_philox.py",
)
collect_ignore = [] if TRITON_ON_CPU or torch.cuda.is_available() else [*TRITON_FILES]
if cuda_library()[0] is None or SHIM:  # no nvcc here: there is no compiled kernel to look at
    collect_ignore += ["test_cuda_build.py", "test_cuda_ptx.py"]


def pytest_addoption(parser):
    parser.addoption("--backend", help="run only the tests that are made for this backend")


def pytest_collection_modifyitems(config, items):
    only = config.getoption("--backend")
    if only is None:
        return
    kept = [item for item in items if _backend_name(item) == only and not ((TRITON_ON_CPU or SHIM) and _is_long(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _backend_name(item) -> str | None:
    """The backend whose kernels a test runs; of most tests `backends_of` made it a parameter."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for fixture in ("backend", "kernels"):
        if fixture in params:
            return params[fixture].name
    return getattr(item.module, "BACKEND", None)


def _is_long(item) -> bool:
    return item.get_closest_marker("long_interpreted") is not None


def backends_of(op: str) -> list[Backend]:
    """Backends that run `op` on this machine, each with the device its test inputs live on."""
    cuda, triton = ("cpu" if emulated else "cuda" for emulated in (SHIM, TRITON_ON_CPU))
    devices = {"reference": "cpu", "cpu": "cpu", "cuda": cuda, "triton": triton}
    found = [Backend(name, device) for name, device in devices.items() if device == "cpu" or torch.cuda.is_available()]
    return [b for b in found if registry.why_not(b.name, op, torch.device(b.device), torch.float32) is None]


def pytest_generate_tests(metafunc):
    for fixture in {"backend", "kernels"} & set(metafunc.fixturenames):
        choices = [b for b in backends_of(metafunc.module.OP) if fixture == "backend" or b.name != "reference"]
        metafunc.parametrize(
            fixture,
            [pytest.param(b, marks=pytest.mark.gpu if b.device == "cuda" else ()) for b in choices],
            ids=[b.name for b in choices],
            indirect=True,
        )


def _active(request):
    with lk.use_backend(request.param.name):
        yield request.param


backend = pytest.fixture(_active, name="backend")
kernels = pytest.fixture(_active, name="kernels")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """What is not marked gpu runs as on a machine without one, the processes that it starts too."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            for module in (torch.cuda, torch.accelerator):
                patch.setattr(module, "is_available", lambda: False)
        return (yield)


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    """What the shell exports must not decide which kernels are tested."""
    monkeypatch.delenv("LAYERSKIP_BACKEND", raising=False)
