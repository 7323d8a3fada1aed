"""Weights in 8 or 4 bits while loading: made from a model's own, or found in what torchao has quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.messages import shown
from layerskip_kernels.models import torchao
from layerskip_kernels.models.checkpoint import Checkpoint
from layerskip_kernels.ops.quantized import QuantizedWeight, quantize

QUANTIZATIONS = {"int8": 8, "int4": 4}


def bits_of(quantization: str | None, device: torch.device) -> int | None:
    """Bits that weights on `device` shall get; None: none asked for."""
    if quantization is None:
        return None
    if not isinstance(quantization, str) or quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization={shown(quantization)}: choose int8 or int4, or None")
    if device.type != "cpu":
        raise ValueError(f"quantization={quantization!r}: quantized weights run on the CPU alone, not on {device}")
    return QUANTIZATIONS[quantization]


def head_bits(bits: int) -> int:
    """Of an LM head beside linears in `bits`: always 8, since 4 bits there cost as much quality as in all linears."""
    return max(bits, 8)


def quantized(name: str, weight: Tensor, bits: int) -> QuantizedWeight:
    """`ops.quantize`, whose errors name the weight."""
    try:
        return quantize(weight, bits)
    except ValueError as error:
        raise ValueError(f"{name} cannot be quantized to {bits} bits: {error}") from error


def read_torchao(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, Any]:
    """The weights that torchao has quantized in a checkpoint. In `shapes` they take the place of their parts.

    Raises ValueError when they are in a layout that is not supported, or incomplete.
    """
    found = {}
    for name, described in torchao.stored_weights(checkpoint.metadata()).items():
        if device.type != "cpu":
            raise ValueError(f"{name} is quantized, and quantized weights run on the CPU alone, not on {device}")
        names = torchao.part_names(name)
        parts = {part: checkpoint.stored(stored) for part, stored in names.items() if stored in shapes}
        found[name] = torchao.from_parts(name, described, parts)
        for part in parts:
            del shapes[names[part]]
        shapes[name] = found[name].shape
        checkpoint.map_anew(names["qdata"])
    return found


def refuse_twice(quantization: str, tensors: dict[str, Any]) -> None:
    """Raises ValueError when some of the weights are quantized already."""
    if name := next((name for name, tensor in tensors.items() if isinstance(tensor, QuantizedWeight)), None):
        raise ValueError(f"quantization={quantization!r}: {name} is quantized already, leave the argument out")
