"""The compiled libraries, loaded when first needed; a library that does not load leaves its reason behind.

`cpu` and `cuda` adapt torch tensors to pointers and are backends of `layerskip_kernels.registry`.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType

_BUILD_HINT = "reinstall the package (pip install .) to build it"


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    module = f"{__name__}.{name}"
    try:
        return import_module(module), None
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None, f"the library {name} is not part of this installation: {_BUILD_HINT}"
    except ImportError as error:
        return None, f"the library {name} does not load ({error}): {_BUILD_HINT}"


def cpu_library() -> tuple[ModuleType | None, str | None]:
    """The CPU library, or None and the reason why there is none."""
    return _load("_cpu")


def cuda_library() -> tuple[ModuleType | None, str | None]:
    """The CUDA library, or None and the reason why there is none. Loads without a driver or a device."""
    cpu, reason = cpu_library()
    if cpu is None:
        return None, reason
    note = cpu.build_info()["cuda"]
    if note != "built":  # an older _cuda may still lie beside it
        return None, f"not built: {note}"
    return _load("_cuda")
