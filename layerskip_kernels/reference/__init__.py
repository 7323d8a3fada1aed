"""Every op in plain PyTorch: the specification the kernels are tested against. Written to be read, not to be fast."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

from layerskip_kernels.reference.decoder_stack import compose
from layerskip_kernels.reference.early_exit_cross_entropy import early_exit_cross_entropy
from layerskip_kernels.reference.exit_head import exit_head
from layerskip_kernels.reference.kv_rollback import kv_rollback
from layerskip_kernels.reference.quantize import quantize
from layerskip_kernels.reference.rms_norm import rms_norm
from layerskip_kernels.reference.rope_append import rope_append
from layerskip_kernels.reference.small_linear import small_linear
from layerskip_kernels.reference.swiglu import swiglu
from layerskip_kernels.reference.verify_attention import verify_attention
from layerskip_kernels.reference.verify_rejection import verify_rejection
from layerskip_kernels.reference.verify_tokens import verify_tokens

OPS = {
    op.__name__: op
    for op in (
        rms_norm,
        small_linear,
        swiglu,
        rope_append,
        verify_attention,
        exit_head,
        verify_tokens,
        verify_rejection,
        kv_rollback,
        early_exit_cross_entropy,
        quantize,
    )
}
OPS["decoder_stack"] = functools.partial(compose, SimpleNamespace(**OPS))
QUANTIZED_OPS = ("small_linear", "exit_head", "decoder_stack")


def why_unavailable() -> str | None:
    return None


def why_unsupported(op: str, *, device: torch.device, dtype: torch.dtype) -> str | None:
    return None
