"""The built CUDA library as its file is: what cuobjdump, which comes with Triton, reads from it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import triton

from layerskip_kernels import native

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def cuobjdump(*options: str, folder: Path | None = None) -> str:
    """What it prints; files that it makes go to `folder`."""
    (library,) = Path(native.__file__).parent.glob("_cuda*.so")
    environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    command = [TOOLS / "cuobjdump", *options, library]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout
