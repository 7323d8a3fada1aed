"""Finds what the recipe needs inside a transformers model, whatever wraps it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from layerskip_kernels.models.config import check_supported


class ModelParts(NamedTuple):
    layers: list[nn.Module]  # the decoder layers that run, in order
    norm: nn.Module  # the final norm, shared by all exits
    lm_head: nn.Linear


def model_parts(model: nn.Module) -> ModelParts:
    """Decoder layers, final norm and LM head of a supported causal language model.

    Args:
        model: the model, or what DistributedDataParallel, torch.compile or PEFT made of it.

    Raises:
        ValueError: the family is not supported, or the head is not a plain matrix (an adapter sits on it).
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    check_supported(lambda name: getattr(config, name, None))
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    # Subclasses of Linear are quantized or adapted: their weight alone is not what they compute.
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"lm_head is a {type(head).__name__}: the exits share a plain torch.nn.Linear without bias, "
            "leave it out of adapters and quantization"
        )
    return ModelParts(list(decoder.layers[: config.num_hidden_layers]), decoder.norm, head)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DistributedDataParallel, torch.compile and PEFT wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
