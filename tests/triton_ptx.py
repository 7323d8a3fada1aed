"""The Triton backend on CPU tensors, as compiled for a GPU: after `install(arch)` a launch runs its kernel's PTX there.

Triton specialises and compiles as for a GPU of compute capability `arch`; ptx_to_cpp.py and tests/native/cuda_shim run
what comes out. Nothing of the backend is replaced but what it asks a GPU: its name, its multiprocessors, its memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
from pathlib import Path

import torch
from cuda_shim import ROOT, run
from ptx_to_cpp import translate

VARIABLE = "LAYERSKIP_TEST_TRITON_PTX"  # compute capability to compile for, 90 say
SHIM = ROOT / "tests/native/cuda_shim"
FOLDER = ROOT / "build/triton_ptx"
COMPILER = (
    *(os.environ.get("CXX", "c++"), "-std=c++17", "-Og", "-march=native", "-ffp-contract=off", "-fwrapv", "-w"),
    *("-fPIC", "-fvisibility=hidden", f"-I{SHIM}", f"-I{ROOT}/csrc"),
)
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f"}
FORMATS |= {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
LOADED: dict[Path, ctypes.CDLL] = {}  # a library per kernel


def install(arch: int) -> None:
    """Before the package is imported."""
    from triton.runtime import driver

    driver.set_active(Driver(arch))
    torch.cuda.current_device = lambda: -1  # what a CPU tensor's get_device() says

    from layerskip_kernels import triton
    from layerskip_kernels.triton import configs, launch

    triton.INTERPRETED = True  # it is asked whether CPU tensors are welcome
    launch.DEVICE_TYPE = "cpu"
    launch._num_sms = lambda index: 132
    launch._can_overlap = lambda index: arch >= 90
    configs._device_name = lambda index: "none"


class Driver:
    """What Triton asks a GPU's driver for."""

    def __init__(self, arch: int):
        self.arch = arch
        self.utils = self
        self.launcher_cls = Launcher

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10 if self.arch >= 90 else 163 << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads of a block at most


class Launcher:
    def __init__(self, source, metadata):
        from triton.runtime.cache import get_cache_manager

        ptx = Path(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx"))
        self.launch = _compiled(translate(ptx.read_text(), launcher=True))
        self.kinds = list(source.signature.values())
        self.block = metadata.num_warps * 32, metadata.shared

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        given = [(kind, value) for kind, value in zip(self.kinds, arguments) if kind != "constexpr"]
        layout = "".join("P" if kind.startswith("*") else FORMATS[kind] for kind, _ in given)
        values = [value.data_ptr() if kind.startswith("*") else value for kind, value in given]
        # Behind its own arguments a kernel has two pointers to memory of Triton's, which none of ours asks for.
        self.launch(struct.pack(f"@{layout}PP", *values, 0, 0), x, y, z, *self.block)


@functools.cache
def _compiled(cpp: str):
    """The function `launch` of this C++. What was compiled once stays in the build folder."""
    header = _header()
    name = hashlib.sha256(f"{header.name}{cpp}".encode()).hexdigest()[:24]
    library = FOLDER / f"{name}.so"
    if not library.exists():
        source, made = FOLDER / f"{name}-{os.getpid()}.cpp", FOLDER / f"{name}-{os.getpid()}.so"
        source.write_text(f'{cpp}\n#include "switch.cpp"\n')
        run(COMPILER[0], f"-I{header}", *COMPILER[1:], "-shared", str(source), "-o", str(made))
        source.unlink()
        made.replace(library)
    LOADED[library] = loaded = ctypes.CDLL(str(library))
    launch = loaded.launch
    launch.argtypes = [ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_size_t]
    return launch


@functools.cache
def _header() -> Path:
    """A folder with ptx.h precompiled, named after all that it is made of."""
    files = [
        SHIM / name
        for name in ("ptx.h", "memory_counts.h", "emulator.h", "cuda_runtime.h", "cuda/intrinsics.cuh", "switch.cpp")
    ]
    content = b"".join(file.read_bytes() for file in files) + " ".join(COMPILER).encode()
    folder = FOLDER / hashlib.sha256(content).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "ptx.h.gch"
    if not header.exists():
        made = folder / f"{os.getpid()}.gch"
        run(*COMPILER, "-x", "c++-header", str(SHIM / "ptx.h"), "-o", str(made))
        made.replace(header)
    return folder
