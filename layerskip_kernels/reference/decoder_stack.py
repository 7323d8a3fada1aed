from __future__ import annotations

from types import SimpleNamespace

import torch

from layerskip_kernels.ops.decoder_stack import DecoderLayers


def compose(
    ops: SimpleNamespace,
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
) -> None:
    """`decoder_stack` out of the ops of `ops` (see `registry.bind`): the specification of a layer."""
    batch, window, width = hidden.shape
    x = stream = hidden.reshape(batch * window, width)
    for layer, keys, values in zip(layers, k_cache, v_cache):
        dim = keys.shape[-1]
        q, k, v = ops.small_linear(
            x, [layer.q, layer.k, layer.v], bias=[layer.q_bias, layer.k_bias, layer.v_bias], norm=(layer.attn_norm, eps)
        )
        if layer.q_norm is not None:
            q = ops.rms_norm(q.view(-1, dim), layer.q_norm, eps)
            k = ops.rms_norm(k.view(-1, dim), layer.k_norm, eps)
        q, k, v = (t.view(batch, window, -1, dim) for t in (q, k, v))
        where = dict(lengths=lengths, slot_ids=slot_ids, num_queries=num_queries)
        rope = (inv_freq, attention_factor) if layer.use_rope else (torch.zeros_like(inv_freq), 1.0)
        ops.rope_append(q, k, v, keys, values, positions=positions, inv_freq=rope[0], attention_factor=rope[1], **where)
        attended = ops.verify_attention(q, keys, values, scale=scale, sliding_window=layer.sliding_window, **where)
        x = ops.small_linear(attended.view(batch * window, -1), layer.o, bias=layer.o_bias, residual=x)
        mlp, biases = [layer.gate, layer.up], [layer.gate_bias, layer.up_bias]
        gated = ops.small_linear(x, mlp, bias=biases, norm=(layer.mlp_norm, eps), swiglu=True)
        out = stream if layer is layers[-1] else None
        x = ops.small_linear(gated, layer.down, bias=layer.down_bias, residual=x, out=out)
    if stream.data_ptr() != hidden.data_ptr():  # rows so strided that they had to be copied
        hidden.copy_(stream.view(batch, window, width))
