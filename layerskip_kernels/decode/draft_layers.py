"""Quantized copies of the early layers, which draft in their place.

A draft costs the bytes of its layers. Where copies draft, the early layers themselves run once a round, over the whole
window together with the others, instead of once for each of its tokens: what a copy wrote into the cache is written
over, and what verification says is the model's own, to the bit.
"""

from __future__ import annotations

from types import SimpleNamespace

from layerskip_kernels import registry
from layerskip_kernels.decode.arguments import one_of
from layerskip_kernels.models.quantization import QUANTIZATIONS
from layerskip_kernels.models.weights import ModelWeights
from layerskip_kernels.ops import DecoderLayers, LayerWeights, QuantizedWeight, dequantize, quantize
from layerskip_kernels.ops.decoder_stack import LINEARS

DRAFT_LAYERS = ("auto", "shared", *QUANTIZATIONS)
AUTO = "int8"  # what "auto" makes where copies pay: 4 bits lose drafts of models whose choices are close
AUTO_BYTES = 32 << 20  # of the early layers: fewer are read from the processor's caches
MOST_ROWS = 4  # sequences in a round: with more, arithmetic takes longer than the bytes that copies save


class DraftLayers:
    """The first layers of a model with their linears in `bits`, in groups of 64 columns; made as they are asked for."""

    def __init__(self, weights: ModelWeights, bits: int):
        self._weights, self._bits = weights, bits
        self._made: list[LayerWeights] = []

    def first(self, count: int) -> DecoderLayers:
        """Layers [0, count). Raises ValueError, naming the weight, for one that has no such copy."""
        while len(self._made) < count:
            self._made.append(self._copy(len(self._made)))
        return DecoderLayers(self._made[:count])

    def _copy(self, number: int) -> LayerWeights:
        layer, copies = self._weights.layers[number], {}
        for name in LINEARS:
            weight = getattr(layer, name)
            if _bits(weight) > self._bits:
                try:
                    weight = dequantize(weight) if isinstance(weight, QuantizedWeight) else weight
                    copies[name] = quantize(weight, self._bits)
                except ValueError as error:
                    reason = f"{name} of layer {number} cannot be copied in {self._bits} bits: {error}"
                    raise ValueError(reason) from error
        return layer._replace(**copies)


def choose_draft_layers(asked: str, weights: ModelWeights, ops: SimpleNamespace, exit_layer: int | None) -> str:
    """ "shared", "int8" or "int4" for what was asked.

    "auto" takes copies on the native CPU backend where the linears of the first `exit_layer` layers have more bits and
    the layers `AUTO_BYTES` or more. Elsewhere it is "shared".

    Raises ValueError, in one sentence, for copies that the backend can't use.
    """
    one_of("draft_layers", asked, DRAFT_LAYERS)
    backend, held = ops.backends["small_linear"], weights.embedding
    reason = registry.why_not(backend, "small_linear", held.device, held.dtype, quantized=True)
    if asked == "auto":
        early = weights.layers[: exit_layer or 0]
        size = sum(getattr(field, "nbytes", 0) for layer in early for field in layer)
        pays = backend == "cpu" and size >= AUTO_BYTES and has_more_bits(early, AUTO)
        return AUTO if pays and not reason else "shared"
    if asked != "shared" and reason:
        raise ValueError(f"draft_layers={asked!r}: backend {backend!r} has no use for it ({reason}), choose shared")
    return asked


def make_draft_layers(name: str, weights: ModelWeights, exit_layer: int | None) -> DraftLayers | None:
    """The copies, up to `exit_layer` made at once; None where the model's own layers draft, or are such already."""
    if name == "shared" or not has_more_bits(weights.layers, name):
        return None
    layers = DraftLayers(weights, QUANTIZATIONS[name])
    layers.first(exit_layer or 0)
    return layers


def has_more_bits(layers: DecoderLayers, name: str) -> bool:
    return any(_bits(getattr(layer, field)) > QUANTIZATIONS[name] for layer in layers for field in LINEARS)


def _bits(weight) -> int:
    return weight.bits if isinstance(weight, QuantizedWeight) else 8 * weight.element_size()
