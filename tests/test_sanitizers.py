"""Builds the CPU library with tests/native, a program that runs every op, under sanitizers, and runs it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from layerskip_kernels.native import _cpu

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = [v for v in _cpu.build_info()["variants"] if not _cpu.why_variant_unsupported(v)]
# Every access of plain AVX-512's is one of the variants on top of it, too.
ADDRESSED = [v for v in RUNNABLE if v != "avx512" or "avx512_bf16" not in RUNNABLE]
EMULATED = [v for v in ("avx512", "avx512_bf16", "avx512_amx", "neon", "neon_bf16") if v not in RUNNABLE]
OPTIONS = {
    # die_after_fork: the child starts threads of its own, which is what is tested.
    "TSAN_OPTIONS": "die_after_fork=0 halt_on_error=1",
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
}


def run(*command, **kwargs):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-8000:]}"
    return result.stdout


X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.mark.parametrize(
    ("sanitize", "variants", "emulate"),
    [
        pytest.param("address,undefined", ADDRESSED, "OFF", id="address"),
        # what threads share is the same in every variant
        pytest.param("thread", ["scalar", *RUNNABLE[1:][-1:]], "OFF", id="thread"),
        pytest.param("", ["scalar"], "OFF", id="scalar-only"),  # what a processor without AVX2 gets
        # what this processor lacks, its instructions replaced by tests/native/*_emulated
        *[pytest.param("", ["scalar", *EMULATED], "ON", id="emulated")] * X86,
    ],
)
def test_every_op(tmp_path, sanitize, variants, emulate):
    cmake = shutil.which("cmake")
    assert cmake and shutil.which("ninja"), "cmake and ninja are part of the test extra"
    # -O1 compiles in half the time of -O3 and keeps the checks.
    run(
        cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DLAYERSKIP_DRIVER=ON",
        "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1",
        f"-DLAYERSKIP_SANITIZE={sanitize}", f"-DLAYERSKIP_CPU_VARIANTS={';'.join(variants)}",
        f"-DLAYERSKIP_EMULATE={emulate}",
    )  # fmt: skip
    run(cmake, "--build", str(tmp_path), "--target", "layerskip_driver", "--parallel", str(os.cpu_count()))
    output = run(str(tmp_path / "layerskip_driver"), env={**os.environ, **OPTIONS})
    for variant in variants:
        assert f"{variant}: running" in output
    assert "0 failures" in output
