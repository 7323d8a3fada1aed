"""Backend "cuda": the native library of csrc/cuda."""

from __future__ import annotations

import functools

import torch

from layerskip_kernels.native import cuda_library
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.tensor import FLOAT_DTYPES

MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 matrix instructions and asynchronous copies


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


@functools.cache
def why_unsupported(op: str, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on tensors of this device and dtype; None when it can."""
    if op not in OPS:
        return f"it has no {op}"
    if device.type != launch.DEVICE_TYPE:
        return f"it takes {launch.DEVICE_TYPE} tensors, not {device.type}"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, {device} has {capability[0]}.{capability[1]}"
    if op in _TOKEN_OPS or dtype is None or dtype in FLOAT_DTYPES:
        return None
    return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"


_TOKEN_OPS = ("verify_tokens", "verify_rejection")  # their dtypes are fixed, whatever the model's
OPS = {}
if cuda_library()[0] is not None:
    from layerskip_kernels.native.cuda.exit_head import exit_head
    from layerskip_kernels.native.cuda.kv_rollback import kv_rollback
    from layerskip_kernels.native.cuda.rms_norm import rms_norm
    from layerskip_kernels.native.cuda.rope_append import rope_append
    from layerskip_kernels.native.cuda.small_linear import small_linear
    from layerskip_kernels.native.cuda.swiglu import swiglu
    from layerskip_kernels.native.cuda.verify_attention import verify_attention
    from layerskip_kernels.native.cuda.verify_rejection import verify_rejection
    from layerskip_kernels.native.cuda.verify_tokens import verify_tokens

    OPS = {
        "exit_head": exit_head,
        "kv_rollback": kv_rollback,
        "rms_norm": rms_norm,
        "rope_append": rope_append,
        "small_linear": small_linear,
        "swiglu": swiglu,
        "verify_attention": verify_attention,
        "verify_rejection": verify_rejection,
        "verify_tokens": verify_tokens,
    }
