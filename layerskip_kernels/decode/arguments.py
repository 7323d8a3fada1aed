"""Checks of what a caller asks for: one sentence naming the argument, its value and the allowed range."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerskip_kernels.decode.batch import SamplingOptions

DEFAULT_SPECULATIONS = 6


def device(value: str | torch.device) -> torch.device:
    if str(value) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = str(value).partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or not index):
        raise ValueError(f"device={str(value)!r}: choose auto, cpu, cuda or cuda:0, cuda:1, ...")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(value)!r}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return torch.device(value)


def exit_layer(value: int | None, config, default: int | None) -> int | None:
    layers = config.num_layers
    if value is None:
        return default if layers > 1 else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"exit_layer={value!r}: must be a whole number, 1..{layers - 1}")
    if not 1 <= value < layers:
        raise ValueError(f"exit_layer={value}: the model has {layers} layers, choose 1..{layers - 1}")
    return value


def speculations(value: int | None, default: int) -> int:
    value = whole("num_speculations", default if value is None else value, 0)
    if value > 63:
        raise ValueError(f"num_speculations={value}: choose 0..63")
    return value


def whole(name: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: must be a whole number")
    if value < low:
        raise ValueError(f"{name}={value}: must be at least {low}")
    return value


def eos_ids(value, config) -> tuple[int, ...]:
    if value is None:
        return config.eos_token_ids
    ids = (value,) if isinstance(value, int) else tuple(value)
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise ValueError(f"eos_token_id={token!r}: choose token ids in 0..{config.vocab_size - 1}")
    return ids


def sampling(count: int, sample, temperature, top_k, top_p, min_p, seed) -> list[SamplingOptions | None]:
    if not sample:
        return [None] * count
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be 0 or more")
    whole("top_k", top_k, 0)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}: must be in 0..1")
    return [SamplingOptions(float(temperature), top_k, float(top_p), *key, float(min_p)) for key in keys(count, seed)]


def keys(count: int, seed: int | Sequence[int] | None) -> list[tuple[int, int]]:
    """(seed, stream) of each of `count` requests."""
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
    if isinstance(seed, int):
        pairs = [(seed, i) for i in range(count)]
    elif len(seed) == count:
        pairs = [(int(s), 0) for s in seed]
    else:
        raise ValueError(f"seed: {len(seed)} values for {count} prompts, give one number or one for each")
    for value, _ in pairs:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed={value}: must fit in 64 bits")
    return pairs
