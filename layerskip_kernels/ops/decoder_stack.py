from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from layerskip_kernels import registry
from layerskip_kernels.ops import _check, _library
from layerskip_kernels.ops.quantized import QuantizedWeight, check_one_kind, check_weight, refuse_tracing


class LayerWeights(NamedTuple):
    """One decoder layer, tensors as checkpoints store them (row-major [out, in]); linears may be quantized."""

    attn_norm: torch.Tensor  # [C]
    q: torch.Tensor | QuantizedWeight  # [H*D, C]
    k: torch.Tensor | QuantizedWeight  # [G*D, C]
    v: torch.Tensor | QuantizedWeight  # [G*D, C]
    o: torch.Tensor | QuantizedWeight  # [C, H*D]
    mlp_norm: torch.Tensor  # [C]
    gate: torch.Tensor | QuantizedWeight  # [I, C]
    up: torch.Tensor | QuantizedWeight  # [I, C]
    down: torch.Tensor | QuantizedWeight  # [C, I]
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None  # [D], per head (Qwen3)
    k_norm: torch.Tensor | None = None
    sliding_window: int | None = None
    use_rope: bool = True


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # fields that may be quantized


class DecoderLayers(tuple):
    """Layers of one model, in order. `packed` is where a backend keeps what it prepared from them."""

    def __new__(cls, layers: Iterable[LayerWeights] = ()):
        self = super().__new__(cls, layers)
        self.packed = {}
        return self


def decoder_stack(
    hidden: torch.Tensor,
    layers: DecoderLayers,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    eps: float,
    scale: float,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_factor: float = 1.0,
    slot_ids: torch.Tensor | None = None,
    num_queries: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> None:
    """Run a range of Llama-style decoder layers over each sequence's window, appending its K/V to the cache.

    Equals `compose` of `reference/decoder_stack.py`, the same layer written with this package's other ops, bit for
    bit on one backend.

    Args:
        hidden: [B, T, C] float32, float16 or bfloat16: the residual stream, updated in place. Rows at and beyond
            num_queries hold nothing of meaning afterwards.
        layers: the n layers to run.
        k_cache, v_cache: [n, slots, G, S, D], the cache of these layers.
        eps: of every norm. scale: of the attention.
        lengths, positions, inv_freq, attention_factor, slot_ids, num_queries: as in `rope_append`; layers with
            ``use_rope=False`` do not rotate.
        block_table: reserved for paged caches.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range.
    """
    _check.tensor("hidden", hidden, (None, None, None), dtype=_check.FLOATS)
    batch, window, width = hidden.shape
    if not isinstance(layers, DecoderLayers) or not layers:
        raise TypeError(f"layers: expected a non-empty DecoderLayers, got {type(layers).__name__}")
    _check.tensor("k_cache", k_cache, (len(layers), None, None, None, None), dtype=hidden.dtype, like=hidden)
    _check.tensor("v_cache", v_cache, tuple(k_cache.shape), dtype=hidden.dtype, like=hidden)
    dim = k_cache.shape[4]
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"D={dim}: choose a multiple of 8 in 8..256")
    _check_layers(layers, width, k_cache, hidden)
    _check.positive("eps", eps)
    _check.positive("scale", scale)
    _check.positive("attention_factor", attention_factor)
    _check.tensor("lengths", lengths, (batch,), dtype=torch.int32, like=hidden)
    _check.tensor("positions", positions, (batch, window), dtype=torch.int32, like=hidden)
    _check.tensor("inv_freq", inv_freq, dtype=torch.float32, like=hidden)
    half = dim // 2
    if tuple(inv_freq.shape) not in ((half,), (batch, window, half)):
        raise ValueError(f"inv_freq: shape {list(inv_freq.shape)}, expected [{half}] or [{batch}, {window}, {half}]")
    _check.slots(slot_ids, batch, k_cache.shape[1], hidden)
    _check.optional("num_queries", num_queries, (batch,), dtype=torch.int32, like=hidden)
    _check.no_paging(block_table)
    quantized = any(isinstance(getattr(layer, name), QuantizedWeight) for layer in layers for name in LINEARS)
    if quantized:
        refuse_tracing("layers")
    if torch.compiler.is_compiling():
        torch.ops.layerskip_kernels.decoder_stack(
            hidden,
            [tensor for layer in layers for tensor in layer[:-2]],
            [layer.sliding_window or 0 for layer in layers],
            [layer.use_rope for layer in layers],
            k_cache,
            v_cache,
            eps,
            scale,
            lengths,
            positions,
            inv_freq,
            attention_factor,
            slot_ids,
            num_queries,
        )
        return
    registry.bind(hidden.device, hidden.dtype, quantized=quantized).decoder_stack(
        hidden,
        layers,
        k_cache,
        v_cache,
        eps=eps,
        scale=scale,
        lengths=lengths,
        positions=positions,
        inv_freq=inv_freq,
        attention_factor=attention_factor,
        slot_ids=slot_ids,
        num_queries=num_queries,
    )


def _check_layers(layers: DecoderLayers, width: int, k_cache: torch.Tensor, like: torch.Tensor) -> None:
    groups, dim = k_cache.shape[2], k_cache.shape[4]
    for i, layer in enumerate(layers):
        if not isinstance(layer, LayerWeights):
            raise TypeError(f"layers[{i}]: expected LayerWeights, got {type(layer).__name__}")
        if layer.sliding_window is not None and layer.sliding_window < 1:
            raise ValueError(f"layers[{i}].sliding_window={layer.sliding_window}: must be at least 1, or None")
        if (layer.q_norm is None) != (layer.k_norm is None):
            raise ValueError(f"layers[{i}].q_norm, layers[{i}].k_norm: give both or neither")
        check_weight(f"layers[{i}].q", layer.q, (None, width))
        check_weight(f"layers[{i}].gate", layer.gate, (None, width))
        inner, mlp = layer.q.shape[0], layer.gate.shape[0]
        for together in (("q", "k", "v"), ("gate", "up")):
            check_one_kind(f"layers[{i}]", [getattr(layer, name) for name in together], together)
        if inner % (groups * dim):
            raise ValueError(f"layers[{i}].q: {inner} rows, expected a multiple of G·D = {groups * dim}")
        shapes = LayerWeights(
            attn_norm=(width,),
            q=(inner, width),
            k=(groups * dim, width),
            v=(groups * dim, width),
            o=(width, inner),
            mlp_norm=(width,),
            gate=(mlp, width),
            up=(mlp, width),
            down=(width, mlp),
            q_bias=(inner,),
            k_bias=(groups * dim,),
            v_bias=(groups * dim,),
            o_bias=(width,),
            gate_bias=(mlp,),
            up_bias=(mlp,),
            down_bias=(width,),
            q_norm=(dim,),
            k_norm=(dim,),
        )
        for name, value, shape in zip(LayerWeights._fields[:-2], layer, shapes):
            required = name not in LayerWeights._field_defaults
            check = check_weight if name in LINEARS else _check.tensor if required else _check.optional
            check(f"layers[{i}].{name}", value, shape, dtype=like.dtype, like=like)


def _kernel(
    hidden,
    weights,
    sliding_windows,
    use_rope,
    k_cache,
    v_cache,
    eps,
    scale,
    lengths,
    positions,
    inv_freq,
    attention_factor,
    slot_ids,
    num_queries,
):
    per_layer = len(LayerWeights._fields) - 2
    layers = DecoderLayers(
        LayerWeights(*weights[i * per_layer : (i + 1) * per_layer], sliding_window or None, rope)
        for i, (sliding_window, rope) in enumerate(zip(sliding_windows, use_rope))
    )
    decoder_stack(
        hidden,
        layers,
        k_cache,
        v_cache,
        eps=eps,
        scale=scale,
        lengths=lengths,
        positions=positions,
        inv_freq=inv_freq,
        attention_factor=attention_factor,
        slot_ids=slot_ids,
        num_queries=num_queries,
    )


_library.register(
    "decoder_stack(Tensor(a!) hidden, Tensor?[] weights, int[] sliding_windows, bool[] use_rope, "
    "Tensor(b!) k_cache, Tensor(c!) v_cache, float eps, float scale, Tensor lengths, Tensor positions, "
    "Tensor inv_freq, float attention_factor, Tensor? slot_ids, Tensor? num_queries) -> ()",
    _kernel,
    lambda *args, **kwargs: None,
)
