from __future__ import annotations

from array import array

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.cpu.quantized import quantization, stored
from layerskip_kernels.native.tensor import address, dtype_code
from layerskip_kernels.ops.decoder_stack import LINEARS, DecoderLayers


def decoder_stack(
    hidden: Tensor,
    layers: DecoderLayers,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    eps: float,
    scale: float,
    lengths: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    attention_factor: float = 1.0,
    slot_ids: Tensor | None = None,
    num_queries: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """See layerskip_kernels.ops.decoder_stack."""
    batch, window, width = hidden.shape
    packed = layers.packed.get("cpu")
    if packed is None:
        packed = layers.packed["cpu"] = _pack(layers)
    _cpu.decoder_stack(
        address(hidden, "hidden", "cpu"),
        hidden.stride(),
        packed[0],
        len(layers),
        address(k_cache, "k_cache", "cpu"),
        k_cache.stride(),
        address(v_cache, "v_cache", "cpu"),
        v_cache.stride(),
        eps,
        scale,
        address(lengths, "lengths", "cpu"),
        address(positions, "positions", "cpu"),
        positions.stride(0),
        address(inv_freq, "inv_freq", "cpu"),
        inv_freq.stride()[:2] if inv_freq.dim() == 3 else (0, 0),
        attention_factor,
        0 if slot_ids is None else address(slot_ids, "slot_ids", "cpu"),
        0 if num_queries is None else address(num_queries, "num_queries", "cpu"),
        (batch, window, width, k_cache.shape[2], k_cache.shape[4]),
        dtype_code(hidden, "hidden"),
        torch.get_num_threads(),
    )


_NOT_QUANTIZED = (0,) * 7


def _pack(layers: DecoderLayers) -> tuple[int, array, list[Tensor]]:
    """Address of the layers as the library's StackLayer[], the array it lies in, and what keeps the weights' memory."""
    table, alive = array("q"), []

    def pointer(name: str, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        alive.append(tensor.detach())  # the memory, also where a Parameter is given other data later
        return address(tensor, name, "cpu")

    for layer in layers:
        linear = {}
        for name in LINEARS:
            weight = getattr(layer, name)
            if not isinstance(weight, Tensor):
                alive.extend((weight.scale, weight.offset))
            elements = stored(weight)
            linear[name] = (
                pointer(name, elements),
                elements.stride(0),
                elements.shape[0],
                pointer(f"{name}_bias", getattr(layer, f"{name}_bias")),
                *(quantization(weight, name) or _NOT_QUANTIZED),
            )
        table.append(pointer("attn_norm", layer.attn_norm))
        for name in ("q", "k", "v", "o"):
            table.extend(linear[name])
        table.append(pointer("mlp_norm", layer.mlp_norm))
        for name in ("gate", "up", "down"):
            table.extend(linear[name])
        table.append(pointer("q_norm", layer.q_norm))
        table.append(pointer("k_norm", layer.k_norm))
        table.append(layer.sliding_window or 0)
        table.append(int(layer.use_rope))
    return table.buffer_info()[0], table, alive
