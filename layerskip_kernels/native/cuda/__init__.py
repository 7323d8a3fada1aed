"""Backend "cuda": the native library of csrc/cuda."""

from __future__ import annotations

import functools

import torch

from layerskip_kernels.native import cuda_library
from layerskip_kernels.native.tensor import FLOAT_DTYPES

OPS = {}


@functools.cache
def why_unavailable() -> str | None:
    """Why the backend can't be used here; None when it can."""
    library, reason = cuda_library()
    if library is None:
        return reason
    report = library.device_report()
    if report["reason"]:
        return report["reason"]
    if not torch.cuda.is_available():
        return "this torch build can't use the CUDA device (torch.cuda.is_available() is False)"
    return None


def why_unsupported(op: str, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on tensors of this device and dtype; None when it can."""
    if op not in OPS:
        return f"it has no {op}"
    if device.type != "cuda":
        return f"it takes cuda tensors, not {device.type}"
    if dtype is not None and dtype not in FLOAT_DTYPES:
        return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None
