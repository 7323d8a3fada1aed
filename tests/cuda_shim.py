"""The CUDA backend on CPU tensors: `build()` compiles it against tests/native/cuda_shim, `install(path)` installs it.

The kernels and the adapters are the real ones; the shim says what a CUDA thread, a barrier or a matrix
instruction is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "LAYERSKIP_TEST_CUDA_SHIM"  # path of the module that `build` made


def build(target: str, *options: str, name: str | None = None) -> Path:
    """Folder, called after `name`, with the compiled `target`. A second call compiles only what changed."""
    import pybind11

    cmake = shutil.which("cmake")
    assert cmake and shutil.which("ninja"), "cmake and ninja are part of the test extra"
    folder = ROOT / "build" / f"cuda_shim-{name or target}-{sysconfig.get_config_var('SOABI')}"
    run(
        cmake, "-S", str(ROOT / "tests/native/cuda_shim"), "-B", str(folder), "-G", "Ninja",
        "-DCMAKE_BUILD_TYPE=Release", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}", *options,
    )  # fmt: skip
    run(cmake, "--build", str(folder), "--target", target, "--parallel", os.environ.get("MAX_JOBS") or "2")
    return folder


def run(*command: str, **kwargs) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-8000:]}"
    return result.stdout


def environment(folder: Path) -> dict[str, str]:
    """For a process that shall have the module in `folder` for its CUDA library."""
    (module,) = folder.glob("_cuda*.so")
    return {VARIABLE: str(module)}


def install(path: str) -> None:
    """From here on backend "cuda" is the module at `path`, and takes CPU tensors. Before the package is imported."""
    from layerskip_kernels import native

    name = "layerskip_kernels.native._cuda"
    spec = importlib.util.spec_from_file_location(name, path)
    library = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    native._cuda = library
    native.cuda_library = lambda: (library, None)

    from layerskip_kernels.native import cuda
    from layerskip_kernels.native.cuda import launch

    launch.DEVICE_TYPE = "cpu"
    launch.guard = lambda index: contextlib.nullcontext()
    launch.stream = lambda index: 0
    cuda.why_unavailable = lambda: None
