"""What nvcc made of the kernels, read from the built library: registers, spills, matrix instructions, wide loads.

Collected only where the library is built.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest
from cuda_library import cuobjdump

from layerskip_kernels import native
from layerskip_kernels.registry import OP_NAMES


@functools.cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture, mangled kernel): {"REG": …, "STACK": …, "SHARED": …, "LOCAL": …}}"""
    found, arch, kernel = {}, None, None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function (\w+):", line):
            kernel = match.group(1)
        elif " REG:" in line:
            found[arch, kernel] = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return found


def test_every_kernel_is_there_for_every_architecture():
    kernels = {}
    for arch, kernel in resources():
        kernels.setdefault(arch, set()).add(kernel)
    built = native.cuda_library()[0].build_info()["archs"]
    assert set(kernels) == {f"sm_{arch}" for arch in re.findall(r"(\d+)-real", built)}
    assert len({frozenset(names) for names in kernels.values()}) == 1
    names = " ".join(next(iter(kernels.values())))
    for op in OP_NAMES:
        if op not in ("decoder_stack", "early_exit_cross_entropy", "kv_rollback"):
            assert f"{op}_kernel" in names, op
    assert "add_lengths_kernel" in names and "move_rows_kernel" in names  # kv_rollback


def test_nothing_spills():
    spilling = {key: usage for key, usage in resources().items() if usage["STACK"] or usage["LOCAL"]}
    assert not spilling


def test_two_blocks_of_a_narrow_product_fit_a_multiprocessor():
    """256 threads each, 65536 registers: what keeps enough bytes of weights on their way."""
    narrow = {
        key: usage["REG"]
        for key, usage in resources().items()
        if re.search(r"(small_linear|exit_head)_kernelI\w+Li[12]ELb1E", key[1])
    }
    assert len(narrow) >= 2 * 5
    assert max(narrow.values()) <= 128, narrow


def test_every_kernel_lets_the_next_one_start_and_waits_for_those_in_front():
    """From Hopper on; a kernel that didn't wait could end before one in front of it, and break the chain."""
    checked = 0
    for arch in {arch for arch, _ in resources() if int(arch.removeprefix("sm_")) >= 90}:
        _, *code = re.split(r"Function : (\w+)", cuobjdump("-sass", "-arch", arch))
        for name, instructions in zip(code[::2], code[1::2]):
            if "any_kernel" not in name:
                assert "PREEXIT" in instructions and "ACQBULK" in instructions, f"{name} for {arch}"
                checked += 1
    assert checked or all(int(arch.removeprefix("sm_")) < 90 for arch, _ in resources())


def test_as_many_blocks_of_attention_fit_a_multiprocessor_as_keep_it_busy():
    """By registers, as __launch_bounds__ asks; shared memory has room for as many."""
    least = {"64ELi1": 4, "64ELi2": 2, "128ELi1": 3, "128ELi2": 2, "256ELi1": 2}
    for (arch, kernel), usage in resources().items():
        if match := re.search(r"verify_attention_kernelINS_\w+?ELi(\w+)EEE", kernel):
            threads = 128 * int(match.group(1)[-1])
            assert 65536 // (threads * -(-usage["REG"] // 8) * 8) >= least[match.group(1)], (arch, kernel)


WIDE_LOAD, WIDE_STORE, MMA = r"LDG\.E\.\S*128", r"STG\.E\.\S*128", r"HMMA\.16816\.F32"
CODE = {
    # the weights' pipeline: straight to registers
    r"small_linear_kernelINS_4bf16ELi1ELb1E": {r"LDG\.E\.NA\.\S*128": 16, MMA: 8},
    r"exit_head_kernelINS_3f16ELi2ELb1E": {r"LDG\.E\.NA\.\S*128": 16, MMA: 16},
    r"small_linear_kernelIfLi1ELb1E": {WIDE_LOAD: 8, r"LDG\.E\.NA\.\S*128": 8, r"\bFFMA\b": 64},
    # keys and values: asynchronous copies, then fragments
    r"verify_attention_kernelINS_4bf16ELi128ELi1E": {r"LDGSTS\.E\.\S*128": 32, r"LDSM\.16\.MT?88\.4": 24, MMA: 32},
    r"verify_attention_kernelINS_4bf16ELi128ELi2E": {r"LDGSTS\.E\.\S*128": 16, r"LDSM\.16\.MT?88\.4": 24, MMA: 32},
    r"rms_norm_kernelINS_4bf16E": {WIDE_LOAD: 8, WIDE_STORE: 1},
    r"swiglu_kernelINS_3f16E": {WIDE_LOAD: 2, WIDE_STORE: 1},
}


@pytest.mark.parametrize("kernel", CODE)
def test_instructions(kernel):
    """At least so many of each in the code for Hopper (or the newest architecture built)."""
    arch = "sm_90" if any(arch == "sm_90" for arch, _ in resources()) else max(arch for arch, _ in resources())
    (name,) = (name for a, name in resources() if a == arch and re.search(kernel, name))
    code = cuobjdump("-sass", "-arch", arch, "-fun", name)
    for instruction, least in CODE[kernel].items():
        assert len(re.findall(instruction, code)) >= least, f"{instruction} in {name}"


def test_explains_itself_without_a_driver():
    """The library loads and lists its ops; the reason why they do not run is one sentence."""
    code = (
        "import layerskip_kernels as lk; row = {r.name: r for r in lk.backends()}['cuda']; "
        "print(row.available, len(row.ops), row.reason)"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    available, ops, reason = result.stdout.strip().split(maxsplit=2)
    assert available == "False" and int(ops) == 9
    assert reason.startswith(("no CUDA device", "driver too old", "no usable CUDA device", "this torch build"))
