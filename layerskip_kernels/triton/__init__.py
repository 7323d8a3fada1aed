"""Backend "triton": one module per op, kernel and launcher together. Needs a GPU and no compiled library.

With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors instead, in Triton's interpreter: slowly, to
test them.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from layerskip_kernels.native.tensor import FLOAT_DTYPES

MIN_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 matrix instructions and asynchronous copies

OPS = {}
if find_spec("triton") is not None:
    from layerskip_kernels.triton.early_exit_cross_entropy import early_exit_cross_entropy
    from layerskip_kernels.triton.exit_head import exit_head
    from layerskip_kernels.triton.kv_rollback import kv_rollback
    from layerskip_kernels.triton.launch import INTERPRETED
    from layerskip_kernels.triton.rms_norm import rms_norm
    from layerskip_kernels.triton.rope_append import rope_append
    from layerskip_kernels.triton.small_linear import small_linear
    from layerskip_kernels.triton.swiglu import swiglu
    from layerskip_kernels.triton.verify_attention import verify_attention
    from layerskip_kernels.triton.verify_rejection import verify_rejection
    from layerskip_kernels.triton.verify_tokens import verify_tokens

    OPS = {
        "early_exit_cross_entropy": early_exit_cross_entropy,
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


@functools.cache
def why_unavailable() -> str | None:
    """Why the backend can't be used here; None when it can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


@functools.cache
def why_unsupported(op: str, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on tensors of this device and dtype; None when it can."""
    if op not in OPS:
        return f"it has no {op}"
    expected = "cpu" if INTERPRETED else "cuda"
    if device.type != expected:
        return f"it takes {expected} tensors, not {device.type}"
    if not INTERPRETED and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, {device} has {capability[0]}.{capability[1]}"
    if op in _TOKEN_OPS or dtype is None or dtype in FLOAT_DTYPES:
        return None
    if op in _FLOAT64_OPS and dtype == torch.float64:
        return None
    return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"


_FLOAT64_OPS = ("early_exit_cross_entropy",)  # its gradients can be checked against finite differences
_TOKEN_OPS = ("verify_tokens", "verify_rejection")  # their dtypes are fixed, whatever the model's
