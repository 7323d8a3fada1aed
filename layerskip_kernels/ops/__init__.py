"""The ops: arguments checked, one call. `ops/<op>.py` documents, `reference/<op>.py` specifies."""

from layerskip_kernels.ops.decoder_stack import DecoderLayers, LayerWeights, decoder_stack
from layerskip_kernels.ops.early_exit_cross_entropy import EarlyExitLoss, early_exit_cross_entropy
from layerskip_kernels.ops.exit_head import ExitHead, RepetitionPenalty, Sampling, Screen, exit_head, head_screen
from layerskip_kernels.ops.kv_rollback import kv_rollback
from layerskip_kernels.ops.quantized import QuantizedWeight, dequantize, quantize
from layerskip_kernels.ops.rms_norm import rms_norm
from layerskip_kernels.ops.rope_append import rope_append
from layerskip_kernels.ops.small_linear import small_linear
from layerskip_kernels.ops.swiglu import swiglu
from layerskip_kernels.ops.verify_attention import verify_attention
from layerskip_kernels.ops.verify_rejection import verify_rejection
from layerskip_kernels.ops.verify_tokens import Verified, verify_tokens

__all__ = [
    "DecoderLayers",
    "EarlyExitLoss",
    "ExitHead",
    "LayerWeights",
    "QuantizedWeight",
    "RepetitionPenalty",
    "Sampling",
    "Screen",
    "Verified",
    "decoder_stack",
    "dequantize",
    "early_exit_cross_entropy",
    "exit_head",
    "head_screen",
    "kv_rollback",
    "quantize",
    "rms_norm",
    "rope_append",
    "small_linear",
    "swiglu",
    "verify_attention",
    "verify_rejection",
    "verify_tokens",
]
