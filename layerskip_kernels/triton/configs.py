"""Tuned launch configurations: device -> op -> shape class -> settings, in configs.json beside this file.

    {"NVIDIA H100 80GB HBM3": {"small_linear": {"bfloat16 C=4096 N=16384": {"BLOCK_N": 32, "num_warps": 4}}}}

What the table does not know, the op's own heuristic decides; nothing is tuned while a program runs. Settings must not
change the order of a sum with anything but (N, C, dtype, device), so a shape class names no number of rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from layerskip_kernels.triton.launch import INTERPRETED

PATH = Path(__file__).with_suffix(".json")


def device_name(tensor: Tensor) -> str:
    return "interpreter" if INTERPRETED else _device_name(tensor.get_device())


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def shape_class(dtype: torch.dtype, **sizes: int) -> str:
    """The row of the table for these sizes, each rounded up to a power of two: "bfloat16 C=4096 N=16384"."""
    named = [f"{name}={1 << max(size - 1, 0).bit_length()}" for name, size in sorted(sizes.items())]
    return " ".join((str(dtype).removeprefix("torch."), *named))


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    return json.loads(PATH.read_text())


def tuned(op: str, tensor: Tensor, heuristic: Mapping[str, int], **sizes: int) -> dict[str, int]:
    """`heuristic`, overridden by the table's settings for `op` on the device and dtype of `tensor`."""
    return {**heuristic, **_row(op, device_name(tensor), tensor.dtype, tuple(sizes.items()))}


@functools.cache
def _row(op: str, device: str, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> Mapping[str, int]:
    rows = table().get(device, {}).get(op, {})
    return rows.get(shape_class(dtype, **dict(sizes)), {})
