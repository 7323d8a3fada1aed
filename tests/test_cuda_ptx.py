"""The PTX in the CUDA library, on the CPU: the ops' own tests on the code that nvcc made, inline assembly included.

ptx_to_cpp.py makes C++ of it, which tests/native/cuda_shim runs. Every access is checked for its alignment, those to
shared memory for their bounds. Collected only where the library is built.
"""

import re

import pytest
from cuda_library import cuobjdump
from cuda_shim import ROOT, build, environment, run
from op_tests import GROUPS, pass_tests, use_memory_well
from ptx_to_cpp import translate


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    extracted = tmp_path_factory.mktemp("ptx")
    cuobjdump("-xptx", "all", folder=extracted)
    sources = []
    for ptx in sorted(extracted.glob("*.ptx")):
        source, text = ROOT / "build/ptx" / f"{ptx.stem}.cpp", translate(ptx.read_text())
        source.parent.mkdir(parents=True, exist_ok=True)
        if not source.exists() or source.read_text() != text:  # what didn't change isn't compiled again
            source.write_text(text)
        sources.append(str(source))
    return build("_cuda", f"-DPTX={';'.join(sources)}", name="ptx")


def test_every_kernel_is_the_one_nvcc_made(folder):
    """Those that the C++ compiler made are weak symbols."""
    (module,) = folder.glob("_cuda*.so")
    kernels = re.findall(r" (\w) (_ZN2lk4cuda\d+\w+_kernel\w*)$", run("nm", str(module)), re.M)
    assert len(kernels) > 50 and {kind for kind, _ in kernels} == {"t"}


@pytest.mark.parametrize("group", GROUPS["cuda"])
def test_passes_its_tests(folder, group):
    pass_tests("cuda", group, environment(folder))


def test_overlapping_launches_read_nothing_too_early(folder):
    output = run(str(folder / "overlap"))
    assert "verify_rejection: passed" in output and output.endswith("0 failures\n"), output


def test_memory_is_used_well(folder):
    partial_results = {"global": 5.1}  # of 24 bytes, which threads read field by field from the first-level cache
    use_memory_well("cuda", *environment(folder).values(), {"choose_token": partial_results, "merge": {"global": 1.2}})
