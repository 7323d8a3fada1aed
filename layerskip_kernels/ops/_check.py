"""Argument checks shared by the public ops. Each failure is one sentence: argument, value, allowed range."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(
    name: str,
    value: object,
    shape: tuple[int | None, ...] | None = None,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """`value` as a tensor of `shape` (None: any size) and `dtype`, on the device of `like`, last dim contiguous."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if shape is not None and (
        value.dim() != len(shape) or any(s is not None and s != n for s, n in zip(shape, value.shape))
    ):
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: shape {list(value.shape)}, expected [{wanted}]")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if value.dtype not in allowed:
            raise TypeError(f"{name}: dtype {names((value.dtype,))}, choose {names(allowed)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: on {value.device}, expected {like.device} like the other tensors")
    if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: last dimension has stride {value.stride(-1)}, it must be contiguous")
    return value


def optional(name: str, value: object, shape=None, **kwargs) -> None:
    if value is not None:
        tensor(name, value, shape, **kwargs)


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value}: must be > 0")


def between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: choose {low}..{high}")


def no_paging(block_table: object) -> None:
    if block_table is not None:
        raise ValueError("block_table: paged caches are not supported yet, pass None")


def caches(k_cache, v_cache, *, groups=None, head_dim=None, like=None) -> None:
    """k_cache and v_cache: [slots, G, S, D] of one dtype."""
    tensor("k_cache", k_cache, (None, groups, None, head_dim), dtype=FLOATS, like=like)
    tensor("v_cache", v_cache, tuple(k_cache.shape), dtype=k_cache.dtype, like=k_cache)


def slots(slot_ids, batch: int, num_slots: int, like: torch.Tensor) -> None:
    """slot_ids: [B] int32 or None, in which case there are at least B slots."""
    optional("slot_ids", slot_ids, (batch,), dtype=torch.int32, like=like)
    if slot_ids is None and num_slots < batch:
        raise ValueError(f"slot_ids=None: {batch} rows need as many cache slots, there are {num_slots}")
