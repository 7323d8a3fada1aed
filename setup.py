"""Builds the native libraries with CMake. Kernels take raw pointers: no torch is imported, one build works with any.

Environment:
    LAYERSKIP_CUDA        auto (default): build the CUDA library when nvcc is found; 0: never; 1: required
    LAYERSKIP_CUDA_ARCHS  compute capabilities to build for, e.g. "80;90;100" (PTX of the newest is added)
    CXX, CUDACXX          compilers to use instead of the ones on PATH
    LAYERSKIP_BUILD_DIR   CMake's folder (default: build/cmake-<python>; a second build compiles only what changed)
    MAX_JOBS              parallel compile jobs (default: number of cores)
    CMAKE_ARGS            more arguments for CMake, e.g. "-DLAYERSKIP_CPU_VARIANTS=scalar;avx2"
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
CPU_MODULE = "layerskip_kernels.native._cpu"
CUDA_MODULE = "layerskip_kernels.native._cuda"
DEFAULT_CUDA_ARCHS = ("80", "90", "100")


def log(message: str) -> None:
    print(f"layerskip_kernels: {message}", file=sys.stderr, flush=True)


def cuda_mode() -> str:
    mode = os.environ.get("LAYERSKIP_CUDA", "auto").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise SetupError(f"LAYERSKIP_CUDA={mode!r}: choose auto, 0 or 1")
    return mode


def find_nvcc() -> str | None:
    if named := os.environ.get("CUDACXX"):
        if not shutil.which(named):
            raise SetupError(f"CUDACXX={named!r}: no such program")
        return shutil.which(named)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return found
    return shutil.which("nvcc")


def find_cxx() -> str:
    if named := os.environ.get("CXX"):
        # CXX may carry a launcher or flags ("ccache g++"); CMake takes it apart the same way.
        if not shutil.which(named.split()[0]):
            raise SetupError(f"CXX={named!r}: no such program; name a C++17 compiler")
        return named
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise SetupError("no C++ compiler found (looked for c++, g++, clang++ on PATH): install g++, or name one with CXX")


def max_jobs() -> str:
    jobs = os.environ.get("MAX_JOBS", "").strip() or str(os.cpu_count() or 1)
    if not jobs.isdigit() or int(jobs) < 1:
        raise SetupError(f"MAX_JOBS={jobs!r}: give a whole number of at least 1")
    return jobs


def known_archs(nvcc: str) -> list[str]:
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    archs = re.findall(r"compute_(\d+)", listing.stdout)
    if listing.returncode or not archs:
        output = (listing.stderr or listing.stdout).strip() or f"exit code {listing.returncode}"
        raise SetupError(
            f"{nvcc} was found but does not list its architectures: repair the CUDA toolkit, or set LAYERSKIP_CUDA=0 "
            f"to build without CUDA. Its output: {output}"
        )
    return sorted(set(archs), key=int)


def cuda_archs(nvcc: str) -> list[str]:
    known = known_archs(nvcc)
    wanted = [a for a in re.split(r"[;,\s]+", os.environ.get("LAYERSKIP_CUDA_ARCHS", "").strip()) if a]
    if not wanted:
        archs = [a for a in DEFAULT_CUDA_ARCHS if a in known]
        if not archs:
            raise SetupError(f"{nvcc} knows none of {', '.join(DEFAULT_CUDA_ARCHS)}: set LAYERSKIP_CUDA_ARCHS")
        return archs
    for arch in wanted:
        if arch not in known or int(arch) < 80:
            choices = ", ".join(a for a in known if int(a) >= 80)
            raise SetupError(f"LAYERSKIP_CUDA_ARCHS: unknown architecture {arch!r}, this nvcc can build {choices}")
    return sorted(set(wanted), key=int)


def check_nvcc(nvcc: str, arch: str) -> None:
    """A toolkit without headers, or one that rejects the host compiler, shows here and not after a minute of output."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        command = [nvcc, "-std=c++17", f"-arch=sm_{arch}", "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SetupError(
            f"{nvcc} was found but cannot compile an empty kernel: repair the CUDA toolkit, or set LAYERSKIP_CUDA=0 "
            f"to build without CUDA. Its output: {(result.stderr or result.stdout).strip()}"
        )


class CudaPlan:
    """Which CUDA library the environment asks for and this machine can build."""

    def __init__(self) -> None:
        self.nvcc: str | None = None
        self.archs: list[str] = []
        mode = cuda_mode()
        if mode == "0":
            self.note = "switched off when the package was built (LAYERSKIP_CUDA=0)"
            return
        self.nvcc = find_nvcc()
        if self.nvcc is None:
            if mode == "1":
                raise SetupError("LAYERSKIP_CUDA=1: no nvcc on PATH, in CUDA_HOME or CUDACXX; install the CUDA toolkit")
            self.note = "nvcc was not found when the package was built (LAYERSKIP_CUDA=auto)"
            return
        self.note = "built"

    def check_toolkit(self) -> None:
        if self.nvcc:
            self.archs = cuda_archs(self.nvcc)
            check_nvcc(self.nvcc, self.archs[0])


class CMakeBuild(build_ext):
    """Configures and builds every extension in one fixed folder, so that a second build compiles only what changed."""

    def build_extensions(self) -> None:
        cxx, jobs = find_cxx(), max_jobs()
        PLAN.check_toolkit()
        log(f"CUDA library: {PLAN.note}" + (f" with {PLAN.nvcc} for {', '.join(PLAN.archs)}" if PLAN.nvcc else ""))
        default = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        folder = Path(os.environ.get("LAYERSKIP_BUILD_DIR") or default).resolve()
        products = folder / "products"
        self.configure(folder, products, cxx)
        targets = [ext.name.rpartition(".")[2] for ext in self.extensions]
        self.cmake("--build", str(folder), "--parallel", jobs, "--target", *targets)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(products / target.name, target)
        if not PLAN.nvcc:
            Path(self.get_ext_fullpath(CUDA_MODULE)).unlink(missing_ok=True)  # left by an earlier build with CUDA

    def configure(self, folder: Path, products: Path, cxx: str) -> None:
        import pybind11

        # CMake keeps the first compiler and source folder it saw, so a folder made for others is useless.
        stamp, content = folder / "made_for.txt", f"{ROOT}\n{cxx}\n{PLAN.nvcc}\n"
        if folder.exists() and not (stamp.exists() and stamp.read_text() == content):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(content)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": self.ninja(),
            "Python3_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LAYERSKIP_PYTHON": "ON",
            "LAYERSKIP_PRODUCTS": products,
            "LAYERSKIP_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "LAYERSKIP_VERSION": self.distribution.get_version(),
            "LAYERSKIP_CUDA": "ON" if PLAN.nvcc else "OFF",
            "LAYERSKIP_CUDA_NOTE": PLAN.note,
        }
        environment = {**os.environ, "CXX": cxx}
        if PLAN.nvcc:
            options["CMAKE_CUDA_COMPILER"] = PLAN.nvcc
            real = [f"{arch}-real" for arch in PLAN.archs]
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join([*real, f"{PLAN.archs[-1]}-virtual"])
        defines = [f"-D{name}={value}" for name, value in options.items()]
        more = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self.cmake("-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines, *more, env=environment)

    @staticmethod
    def ninja() -> str:
        if found := shutil.which("ninja"):
            return found
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")

    @staticmethod
    def cmake(*arguments: str, env: dict[str, str] | None = None) -> None:
        try:
            subprocess.run(["cmake", *arguments], check=True, env=env)
        except FileNotFoundError:
            raise SetupError("cmake not found: pip install cmake ninja pybind11") from None
        except subprocess.CalledProcessError as error:
            raise SetupError(f"cmake {arguments[0]} failed (exit code {error.returncode}), see above") from None


try:
    PLAN = CudaPlan()
except SetupError as error:
    sys.exit(f"layerskip_kernels: {error}")

setup(
    ext_modules=[Extension(name, sources=[]) for name in ([CPU_MODULE, CUDA_MODULE] if PLAN.nvcc else [CPU_MODULE])],
    cmdclass={"build_ext": CMakeBuild},
)
