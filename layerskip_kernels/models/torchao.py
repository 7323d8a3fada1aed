"""Weights that torchao has quantized: as `save_pretrained` stores them, and as a live model holds them.

Neither needs torchao itself: a checkpoint has the parts of each weight as plain tensors, and its files' metadata says
what they are parts of; a live model's tensors have the same parts as attributes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.messages import shown
from layerskip_kernels.ops.quantized import BLOCK, QuantizedWeight, stored

SUPPORTED = (
    "torchao's weight-only 8 and 4 bits (Int8WeightOnlyConfig, IntxWeightOnlyConfig of int8 or int4), "
    f"one scale per row or per group of a multiple of {BLOCK} columns"
)
_PARTS = ("qdata", "scale", "zero_point")
_KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_ACTIVATIONS = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")  # of formats that quantize these, too


def is_quantized(tensor: object) -> bool:
    """Whether this parameter of a live model is one of torchao's tensors."""
    return type(tensor).__module__.partition(".")[0] == "torchao"


def from_tensor(name: str, tensor: Any) -> QuantizedWeight:
    """A copy of a live model's tensor, in our order of columns. Raises ValueError as `_convert`."""
    attributes = {key: getattr(tensor, key, None) for key in ("block_size", "target_dtype", *_ACTIVATIONS)}
    parts = {part: getattr(tensor, part, None) for part in _PARTS}
    return _convert(name, type(tensor).__name__, attributes, parts)


def part_names(weight: str) -> dict[str, str]:
    """Names that `save_pretrained` gives the parts of a weight."""
    module, _, leaf = weight.rpartition(".")
    return {part: f"{module}._{leaf}_{part}" for part in _PARTS}


def stored_weights(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of a safetensors file's metadata: for each quantized weight in it what torchao says about it.

    Raises ValueError for a weight whose layout is not supported.
    """
    found = {}
    for name, text in sorted(metadata.items()):
        if not (name.endswith(".weight") and '"_type"' in text):
            continue
        try:
            described = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the metadata of {name} is not valid JSON: {error}") from error
        if isinstance(described, dict) and described.get("_type") not in (None, "Tensor"):
            _check_kind(name, str(described["_type"]))
            found[name] = described
    return found


def from_parts(name: str, described: Mapping[str, Any], parts: Mapping[str, Tensor | None]) -> QuantizedWeight:
    """From a checkpoint's tensors and their description in its metadata. Raises ValueError as `_convert`."""
    values = described.get("_data")
    values = values if isinstance(values, dict) else {}
    attributes = {key: value.get("_data") if _is_tagged(value) else value for key, value in values.items()}
    return _convert(name, str(described["_type"]), attributes, parts)


def _is_tagged(value: object) -> bool:
    return isinstance(value, dict) and value.get("_type") == "torch.dtype"


def _refused(name: str, what: str) -> ValueError:
    return ValueError(f"{name} is {what}, which is not supported: supported is {SUPPORTED}")


def _check_kind(name: str, kind: str) -> None:
    if kind not in _KINDS:
        raise _refused(name, f"a {kind} of torchao")


def _convert(
    name: str, kind: str, attributes: Mapping[str, Any], parts: Mapping[str, Tensor | None]
) -> QuantizedWeight:
    """torchao's ``w = (q - zero_point) · scale``, [N, C] in blocks of [1, group].

    Raises ValueError, in one sentence naming what is supported, for other formats, group sizes and damaged parts.
    """

    def refused(what: str) -> ValueError:
        return _refused(name, what)

    _check_kind(name, kind)
    if any(attributes.get(key) is not None for key in _ACTIVATIONS):
        raise refused(f"a {kind} of torchao that quantizes activations")
    target = str(attributes.get("target_dtype") or "int8").removeprefix("torch.")
    if target not in ("int8", "int4"):
        raise refused(f"quantized to {target}")
    q, scale, zero_point = (parts.get(part) for part in _PARTS)
    block = attributes.get("block_size")
    if q is None or scale is None or q.dim() != 2 or q.dtype != torch.int8:
        raise refused("stored in parts that do not make a matrix of 8-bit integers and their scales")
    rows, width = q.shape
    if not (isinstance(block, (list, tuple)) and len(block) == 2 and block[0] == 1 and isinstance(block[1], int)):
        raise refused(f"quantized in blocks of {shown(block)}")
    group = block[1]
    if group == width:
        group = -(-width // BLOCK) * BLOCK
    if group < BLOCK or group % BLOCK:
        raise refused(f"quantized in groups of {group} columns")
    shape = (rows, -(-width // group))
    for part, tensor in (("scales", scale), ("zero points", zero_point)):
        if tensor is not None and tensor.numel() != shape[0] * shape[1]:
            raise refused(f"stored with {part} of shape {list(tensor.shape)} where [{shape[0]}, {shape[1]}] is due")
    scale = scale.detach().reshape(shape).contiguous()
    if scale.dtype != torch.bfloat16:
        scale = scale.float()
    offset = None
    if zero_point is not None and zero_point.any():
        offset = zero_point.detach().float().reshape(shape).mul(-1).mul_(scale)
    bits = {"int8": 8, "int4": 4}[target]
    if bits == 4 and (width % 2 or q.min() < -8 or q.max() > 7):
        raise refused("stored with values that are not of 4 bits")
    return QuantizedWeight(stored(q.detach(), bits), scale, group, offset)
