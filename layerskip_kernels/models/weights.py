"""The tensors of a decoder and the names they have in transformers' checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from layerskip_kernels.models.config import ModelConfig
from layerskip_kernels.ops.decoder_stack import LINEARS, DecoderLayers, LayerWeights
from layerskip_kernels.ops.quantized import QuantizedWeight, check_one_kind

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ModelWeights:
    """All tensors of one model, of one dtype, on one device; linears and head may be quantized.

    Attributes:
        embedding: ``[V, C]``.
        layers: one ``LayerWeights`` per decoder layer.
        final_norm: ``[C]``, the norm in front of the head.
        lm_head: ``[V, C]``; the same tensor as `embedding` when the model ties them and neither is quantized.
        lm_head_bias: ``[V]`` or None.
    """

    embedding: Tensor
    layers: DecoderLayers
    final_norm: Tensor
    lm_head: Tensor | QuantizedWeight
    lm_head_bias: Tensor | None = None

    @property
    def quantized(self) -> bool:
        """Whether any of them are."""
        layers = (getattr(layer, name) for layer in self.layers for name in LINEARS)
        return any(isinstance(weight, QuantizedWeight) for weight in (self.lm_head, *layers))


def layer_tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each field of ``LayerWeights`` that a layer has: name below ``model.layers.N.`` and shape."""
    c, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    tensors = {
        "attn_norm": ("input_layernorm.weight", (c,)),
        "mlp_norm": ("post_attention_layernorm.weight", (c,)),
    }
    if config.qk_norm:
        tensors["q_norm"] = ("self_attn.q_norm.weight", (d,))
        tensors["k_norm"] = ("self_attn.k_norm.weight", (d,))
    for field, module, shape, bias in (
        ("q", "self_attn.q_proj", (q, c), config.qkv_bias),
        ("k", "self_attn.k_proj", (kv, c), config.qkv_bias),
        ("v", "self_attn.v_proj", (kv, c), config.qkv_bias),
        ("o", "self_attn.o_proj", (c, q), config.o_bias),
        ("gate", "mlp.gate_proj", (i, c), config.mlp_bias),
        ("up", "mlp.up_proj", (i, c), config.mlp_bias),
        ("down", "mlp.down_proj", (c, i), config.mlp_bias),
    ):
        tensors[field] = (f"{module}.weight", shape)
        if bias:
            tensors[f"{field}_bias"] = (f"{module}.bias", shape[:1])
    return tensors


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full name and shape of every tensor of the model; without the head when it is tied to the embedding."""
    shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for name, shape in layer_tensors(config).values():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def linear_names(config: ModelConfig) -> list[str]:
    """Full names of the weights that may be quantized: all linears of all layers, and the head."""
    fields = layer_tensors(config)
    return [f"model.layers.{i}.{fields[name][0]}" for i in range(config.num_layers) for name in LINEARS] + [LM_HEAD]


def check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: Callable[[str], str]) -> None:
    """Raises ValueError when the tensors at hand are not those the configuration describes.

    Args:
        config: the configuration.
        found: name and shape of the tensors at hand.
        where: says where a tensor is or would be (for the message).
    """
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(f"{where(name)} has no tensor {name}, which its configuration calls for")
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{name} in {where(name)} has shape {list(found[name])}, the configuration says {list(shape)}"
            )
    for name in found:
        # old Llama checkpoints store the rotary frequencies, which the configuration determines
        if name in shapes or name == LM_HEAD or name.endswith("rotary_emb.inv_freq"):
            continue
        # leaving out a bias, a layer or an adapter would silently change what the model says
        if name.startswith(("model.", "lm_head.")):
            raise ValueError(f"{where(name)} has a tensor {name}, which its configuration does not describe")


def assemble(config: ModelConfig, tensors: Mapping[str, Tensor | QuantizedWeight]) -> ModelWeights:
    """Arranges named tensors (checked by ``check_tensors``) as a decoder's weights; copies nothing.

    Raises TypeError when of q, k and v, or of gate and up, not all are quantized alike.
    """
    names = layer_tensors(config)
    layers = DecoderLayers(
        LayerWeights(
            **{field: tensors[f"model.layers.{layer}.{name}"] for field, (name, _) in names.items()},
            sliding_window=config.sliding_windows[layer],
            use_rope=config.use_rope[layer],
        )
        for layer in range(config.num_layers)
    )
    for number, layer in enumerate(layers):
        for together in (("q", "k", "v"), ("gate", "up")):
            check_one_kind(f"model.layers.{number}", [getattr(layer, name) for name in together], together)
    embedding, lm_head = tensors[EMBEDDING], tensors.get(LM_HEAD)
    if config.tie_word_embeddings and not isinstance(lm_head, QuantizedWeight):
        lm_head = embedding
    return ModelWeights(embedding, layers, tensors[FINAL_NORM], lm_head)
