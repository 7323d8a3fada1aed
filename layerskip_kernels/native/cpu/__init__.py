"""Backend "cpu": the native library of csrc/cpu.

Its variant (scalar, avx2, avx512, avx512_bf16, avx512_amx, neon, neon_bf16) is picked at run time;
LAYERSKIP_CPU_VARIANT overrides the choice.
"""

from __future__ import annotations

import functools

import torch

from layerskip_kernels.native import cpu_library
from layerskip_kernels.native.tensor import FLOAT_DTYPES


@functools.cache
def why_unavailable() -> str | None:
    """Why the backend can't be used here; None when it can."""
    library, reason = cpu_library()
    if library is None:
        return reason
    try:
        library.active_variant()
    except ValueError as error:
        return str(error)
    return None


def why_unsupported(op: str, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` can't run on tensors of this device and dtype; None when it can."""
    if op not in OPS:
        return f"it has no {op}"
    if device.type != "cpu":
        return f"it takes cpu tensors, not {device.type}"
    if op in _TOKEN_OPS:
        return None
    if op in _TORCH_OPS and dtype == torch.float64:
        return None
    if dtype is not None and dtype not in FLOAT_DTYPES:
        return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


_TOKEN_OPS = ("verify_tokens", "verify_rejection")  # their dtypes are fixed, whatever the model's
_TORCH_OPS = ("early_exit_cross_entropy",)  # made of torch's matrix products, which know float64
QUANTIZED_OPS = ("small_linear", "exit_head", "decoder_stack")
OPS = {}
if cpu_library()[0] is not None:
    from layerskip_kernels.native.cpu.decoder_stack import decoder_stack
    from layerskip_kernels.native.cpu.early_exit_cross_entropy import early_exit_cross_entropy
    from layerskip_kernels.native.cpu.exit_head import exit_head
    from layerskip_kernels.native.cpu.kv_rollback import kv_rollback
    from layerskip_kernels.native.cpu.quantize import quantize
    from layerskip_kernels.native.cpu.rms_norm import rms_norm
    from layerskip_kernels.native.cpu.rope_append import rope_append
    from layerskip_kernels.native.cpu.small_linear import small_linear
    from layerskip_kernels.native.cpu.swiglu import swiglu
    from layerskip_kernels.native.cpu.verify_attention import verify_attention
    from layerskip_kernels.native.cpu.verify_rejection import verify_rejection
    from layerskip_kernels.native.cpu.verify_tokens import verify_tokens

    OPS = {
        "decoder_stack": decoder_stack,
        "early_exit_cross_entropy": early_exit_cross_entropy,
        "exit_head": exit_head,
        "kv_rollback": kv_rollback,
        "quantize": quantize,
        "rms_norm": rms_norm,
        "rope_append": rope_append,
        "small_linear": small_linear,
        "swiglu": swiglu,
        "verify_attention": verify_attention,
        "verify_rejection": verify_rejection,
        "verify_tokens": verify_tokens,
    }
