"""Quantized copies of the LM head that are read in its place: by drafts, and by what must not change.

See `ops.exit_head.Screen`: with the copy of drafts the best of a few rescored tokens is drafted. The other one
answers to the bit what the head itself does.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from layerskip_kernels import registry
from layerskip_kernels.decode.arguments import one_of
from layerskip_kernels.models.quantization import QUANTIZATIONS
from layerskip_kernels.models.weights import LM_HEAD, ModelWeights
from layerskip_kernels.ops import QuantizedWeight, Screen, dequantize, head_screen

DRAFT_HEADS = ("auto", "shared", *QUANTIZATIONS)
HEAD_SCREENS = ("auto", "none", "int8")
AUTO = "int4"  # the draft head that "auto" makes where a copy pays
AUTO_BYTES = 32 << 20  # of the head: a smaller one is read from the processor's caches
AUTO_SHARE = 0.1  # of the bytes that a step reads

_ROWS_AT_ONCE = 16384


def choose_draft_head(asked: str, weights: ModelWeights, ops: SimpleNamespace, exit_layer: int | None) -> str:
    """ "shared", "int8" or "int4" for what was asked.

    "auto" takes a copy on the native CPU backend for a head of `AUTO_BYTES` or more, and of at least `AUTO_SHARE` of
    the bytes that a draft through `exit_layer` layers reads, not in 4 bits itself. Elsewhere it is "shared".

    Raises ValueError, in one sentence, for a copy that the backend can't use.
    """
    return _choose("draft_head", asked, DRAFT_HEADS, AUTO, weights, ops, exit_layer)


def choose_head_screen(asked: str, weights: ModelWeights, ops: SimpleNamespace) -> str:
    """ "none" or "int8" for what was asked, by the same rule for a head that is not quantized and all layers.

    Raises ValueError, in one sentence, for a copy that the backend can't use, or of a head that is quantized itself.
    """
    if asked == "int8" and isinstance(weights.lm_head, QuantizedWeight):
        raise ValueError("head_screen='int8': the LM head is quantized already, choose none")
    return _choose("head_screen", asked, HEAD_SCREENS, "int8", weights, ops, len(weights.layers))


def _choose(name: str, asked: str, choices, best: str, weights: ModelWeights, ops: SimpleNamespace, layers) -> str:
    one_of(name, asked, choices)
    head, backend, off = weights.lm_head, ops.backends["exit_head"], choices[1]
    reason = registry.why_not(backend, "exit_head", weights.embedding.device, weights.embedding.dtype, quantized=True)
    if asked == "auto":
        bits = head.bits if isinstance(head, QuantizedWeight) else 16
        if reason or backend != "cpu" or layers is None or bits <= QUANTIZATIONS[best]:
            return off
        size = sum(getattr(field, "nbytes", 0) for layer in weights.layers[:layers] for field in layer)
        pays = head.nbytes >= AUTO_BYTES and head.nbytes >= AUTO_SHARE * (size + head.nbytes)
        return best if pays else off
    if asked != off and reason:
        raise ValueError(f"{name}={asked!r}: backend {backend!r} has no use for it ({reason}), choose {off}")
    return asked


def make_head_screen(name: str, head: torch.Tensor) -> Screen | None:
    """The copy, in groups of 64 columns; None where none was chosen."""
    return None if name == "none" else _screen(head, QUANTIZATIONS[name], exact=True)


def make_draft_head(
    name: str, head: torch.Tensor | QuantizedWeight, head_screen: Screen | None = None
) -> Screen | None:
    """The copy, in groups of 64 columns; None where the model's own head is what was chosen, or the same already."""
    bits = QUANTIZATIONS.get(name)
    if bits is None:
        return None
    if head_screen is not None and head_screen.weight.bits == bits:
        return Screen(head_screen.weight)
    if not isinstance(head, QuantizedWeight):
        return _screen(head, bits)
    if head.bits == bits:
        return None
    parts = []
    for first in range(0, head.shape[0], _ROWS_AT_ONCE):
        values, scale, offset = (t if t is None else t[first : first + _ROWS_AT_ONCE] for t in head[:2] + head[3:])
        parts.append(_screen(dequantize(QuantizedWeight(values, scale, head.group, offset)), bits).weight)
    return Screen(
        QuantizedWeight(torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]), parts[0].group)
    )


def _screen(head: torch.Tensor, bits: int, exact: bool = False) -> Screen:
    """`ops.head_screen`, whose errors name the weight."""
    try:
        return head_screen(head, bits, exact=exact)
    except ValueError as error:
        raise ValueError(f"{LM_HEAD} cannot be copied in {bits} bits: {error}") from error
