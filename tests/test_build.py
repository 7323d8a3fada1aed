"""The build: clear messages for what the environment gets wrong, no torch needed, libraries that load anywhere."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layerskip_kernels.native
from layerskip_kernels.native.info import build_report

ROOT = Path(__file__).resolve().parent.parent
DRIVER = f"""
import subprocess, sys
sys.modules["torch"] = None  # importing it raises ImportError
run = subprocess.run
def guarded(command, *args, **kwargs):
    if command[0] == "cmake":
        print("cmake", *command[1:])
        sys.exit(77)
    return run(command, *args, **kwargs)
subprocess.run = guarded
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
path = {str(ROOT / "setup.py")!r}
exec(compile(open(path).read(), path, "exec"), {{"__name__": "__main__", "__file__": path}})
"""
REACHED_CMAKE = 77
VARIABLES = ("LAYERSKIP_CUDA", "LAYERSKIP_CUDA_ARCHS", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS")


def run_setup(tmp_path, **variables):
    """`setup.py build_ext` up to its first call of CMake, with no torch and, unless given, no program on PATH."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment |= {"LAYERSKIP_BUILD_DIR": str(tmp_path / "build"), "PATH": str(tmp_path)} | variables
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "lib")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def complaint(result) -> str:
    """The one sentence a failed build ends with."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def tool(folder: Path, name: str, script: str = "exit 0") -> str:
    """An executable shell script, and the PATH that finds it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return str(folder)


NVCC = 'case "$1" in --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90;; *) {compile} ;; esac'


def test_imports_no_torch():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported <= {*sys.stdlib_module_names, "setuptools", "pybind11", "ninja"}


def test_without_cuda_cmake_is_told_so(tmp_path):
    tool(tmp_path, "c++")
    tool(tmp_path, "nvcc", NVCC.format(compile="exit 0"))
    result = run_setup(tmp_path, LAYERSKIP_CUDA="0")
    assert result.returncode == REACHED_CMAKE, result.stderr
    assert "-DLAYERSKIP_CUDA=OFF" in result.stdout
    assert f"-DPython3_EXECUTABLE={sys.executable}" in result.stdout
    assert "LAYERSKIP_CUDA=0" in result.stderr  # it says what it does


def test_auto_without_nvcc_builds_without_cuda_and_says_so(tmp_path):
    tool(tmp_path, "g++")
    result = run_setup(tmp_path)
    assert result.returncode == REACHED_CMAKE, result.stderr
    assert "-DLAYERSKIP_CUDA=OFF" in result.stdout
    assert "nvcc was not found" in result.stderr


def test_auto_with_nvcc_builds_cuda_for_the_architectures_it_knows(tmp_path):
    tool(tmp_path, "c++")
    tool(tmp_path, "nvcc", NVCC.format(compile="exit 0"))
    result = run_setup(tmp_path)
    assert result.returncode == REACHED_CMAKE, result.stderr
    assert "-DLAYERSKIP_CUDA=ON" in result.stdout
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;90-virtual" in result.stdout
    assert "80, 90" in result.stderr


def test_architectures_can_be_chosen(tmp_path):
    tool(tmp_path, "c++")
    tool(tmp_path, "nvcc", NVCC.format(compile="exit 0"))
    result = run_setup(tmp_path, LAYERSKIP_CUDA_ARCHS="90")
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real;90-virtual" in result.stdout


@pytest.mark.parametrize("mode", ["yes", "2", "on"])
def test_unknown_cuda_mode(tmp_path, mode):
    tool(tmp_path, "c++")
    text = complaint(run_setup(tmp_path, LAYERSKIP_CUDA=mode))
    assert f"LAYERSKIP_CUDA='{mode}'" in text and "auto, 0 or 1" in text


def test_cuda_required_but_no_nvcc(tmp_path):
    tool(tmp_path, "c++")
    text = complaint(run_setup(tmp_path, LAYERSKIP_CUDA="1"))
    assert "LAYERSKIP_CUDA=1" in text and "nvcc" in text


@pytest.mark.parametrize("arch", ["75", "91", "sm_90", "100"])
def test_unknown_architecture(tmp_path, arch):
    tool(tmp_path, "c++")
    tool(tmp_path, "nvcc", NVCC.format(compile="exit 0"))
    text = complaint(run_setup(tmp_path, LAYERSKIP_CUDA_ARCHS=f"80;{arch}"))
    assert "LAYERSKIP_CUDA_ARCHS" in text and repr(arch) in text and "80, 90" in text


@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize(
    "script", ["echo cannot execute >&2; exit 126", NVCC.format(compile="echo no header >&2; exit 1")]
)
def test_broken_toolkit_fails_and_names_the_way_out(tmp_path, mode, script):
    tool(tmp_path, "c++")
    tool(tmp_path, "nvcc", script)
    text = complaint(run_setup(tmp_path, LAYERSKIP_CUDA=mode))
    assert "nvcc" in text and "LAYERSKIP_CUDA=0" in text
    assert "cannot execute" in text or "no header" in text


def test_no_cxx_compiler(tmp_path):
    text = complaint(run_setup(tmp_path, LAYERSKIP_CUDA="0"))
    assert "no C++ compiler found" in text and "CXX" in text


def test_named_cxx_compiler_missing(tmp_path):
    tool(tmp_path, "c++")
    assert "CXX='icpx-9'" in complaint(run_setup(tmp_path, LAYERSKIP_CUDA="0", CXX="icpx-9"))


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_bad_max_jobs(tmp_path, jobs):
    tool(tmp_path, "c++")
    assert f"MAX_JOBS='{jobs}'" in complaint(run_setup(tmp_path, LAYERSKIP_CUDA="0", MAX_JOBS=jobs))


def test_cmake_missing(tmp_path):
    tool(tmp_path, "c++")
    driver = DRIVER.replace("subprocess.run = guarded", "")
    environment = {"PATH": str(tmp_path), "LAYERSKIP_CUDA": "0", "LAYERSKIP_BUILD_DIR": str(tmp_path / "build")}
    command = [sys.executable, "-c", driver, str(tmp_path / "lib")]
    assert "cmake not found" in complaint(
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    )


def test_libraries_need_no_torch_and_no_driver(tmp_path):
    """The compiled modules load by themselves, in a process with neither torch nor the package."""
    files = sorted(Path(layerskip_kernels.native.__file__).parent.glob("_c*.so"))
    assert files
    code = (
        "import importlib.util, sys\n"
        "for path in sys.argv[1:]:\n"
        "    name = path.rpartition('/')[2].partition('.')[0]\n"
        "    spec = importlib.util.spec_from_file_location(name, path)\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    print(name, module.build_info()['version'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-I", "-c", code, *map(str, files)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("_cpu ")


def test_unknown_cpu_variant_is_one_sentence():
    code = "from layerskip_kernels.native import cpu; print(cpu.why_unavailable())"
    environment = os.environ | {"LAYERSKIP_CPU_VARIANT": "mmx"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip().startswith("LAYERSKIP_CPU_VARIANT='mmx': choose one of scalar")


def test_report_covers_both_libraries():
    report = build_report()
    assert report["cpu"]["available"] and report["cpu"]["reason"] is None
    assert report["cpu"]["variants"]["scalar"] is None  # runs everywhere
    assert report["cpu"]["active_variant"] in report["cpu"]["variants"]
    assert report["cuda"]["available"] is (report["cuda"]["reason"] is None)
