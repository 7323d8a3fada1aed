"""The head that drafts: the model's own, or a quantized copy of it. Verification always uses the model's own."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from layerskip_kernels import registry
from layerskip_kernels.decode.arguments import one_of
from layerskip_kernels.models.quantization import QUANTIZATIONS, quantized
from layerskip_kernels.models.weights import LM_HEAD, ModelWeights
from layerskip_kernels.ops import QuantizedWeight, dequantize

DRAFT_HEADS = ("auto", "shared", *QUANTIZATIONS)
AUTO = "int8"  # what "auto" makes where a copy pays
AUTO_BYTES = 32 << 20  # of the head: a smaller one is read from the processor's caches
AUTO_SHARE = 0.1  # of the bytes that a draft step reads

_ROWS_AT_ONCE = 16384


def choose_draft_head(asked: str, weights: ModelWeights, ops: SimpleNamespace, exit_layer: int | None) -> str:
    """ "shared", "int8" or "int4" for what was asked.

    "auto" takes a copy on the native CPU backend for a head that is not quantized, of `AUTO_BYTES` or more, and of at
    least `AUTO_SHARE` of the bytes that a draft through `exit_layer` layers reads. Elsewhere it is "shared".

    Raises ValueError, in one sentence, for a copy that the backend can't use.
    """
    one_of("draft_head", asked, DRAFT_HEADS)
    head, backend = weights.lm_head, ops.backends["exit_head"]
    reason = registry.why_not(backend, "exit_head", weights.embedding.device, weights.embedding.dtype, quantized=True)
    if asked == "auto":
        if reason or backend != "cpu" or exit_layer is None or isinstance(head, QuantizedWeight):
            return "shared"
        layers = sum(getattr(field, "nbytes", 0) for layer in weights.layers[:exit_layer] for field in layer)
        pays = head.nbytes >= AUTO_BYTES and head.nbytes >= AUTO_SHARE * (layers + head.nbytes)
        return AUTO if pays else "shared"
    if asked != "shared" and reason:
        raise ValueError(f"draft_head={asked!r}: backend {backend!r} has no use for it ({reason}), choose shared")
    return asked


def make_draft_head(name: str, weights: ModelWeights) -> QuantizedWeight | None:
    """The copy, in groups of 64 columns; None where the model's own head is what was chosen, or the same already."""
    head, bits = weights.lm_head, QUANTIZATIONS.get(name)
    if bits is None:
        return None
    if not isinstance(head, QuantizedWeight):
        return quantized(LM_HEAD, head, bits)
    if head.bits == bits:
        return None
    parts = []
    for first in range(0, head.shape[0], _ROWS_AT_ONCE):
        values, scale, offset = (t if t is None else t[first : first + _ROWS_AT_ONCE] for t in head[:2] + head[3:])
        parts.append(quantized(LM_HEAD, dequantize(QuantizedWeight(values, scale, head.group, offset)), bits))
    return QuantizedWeight(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]), parts[0].group)
