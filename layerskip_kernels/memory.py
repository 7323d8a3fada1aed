"""Memory for large tensors of the CPU."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

_HUGE_PAGE = 2 << 20  # bytes


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """`torch.empty`, on the CPU in huge pages where the system gives them to those who ask.

    What is read at the speed of memory then needs fewer address translations (benchmarks/NOTES.md). Linux only;
    elsewhere, and for small tensors, it is `torch.empty`.

    Raises:
        MemoryError, RuntimeError, TypeError: there is not as much memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes: {error}") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
