"""Checks of what a caller asks for: one sentence naming the argument, its value and the allowed range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from layerskip_kernels.decode.batch import SamplingOptions
from layerskip_kernels.messages import shown


def device(value: str | torch.device) -> torch.device:
    if str(value) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = str(value).partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or not index):
        raise ValueError(f"device={shown(str(value))}: choose auto, cpu, cuda or cuda:0, cuda:1, ...")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={shown(str(value))}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return torch.device(value)


def exit_layer(value: int | None, config, default: int | None) -> int | None:
    layers = config.num_layers
    if value is None:
        return default if layers > 1 else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"exit_layer={shown(value)}: must be a whole number, 1..{layers - 1}")
    if not 1 <= value < layers:
        raise ValueError(f"exit_layer={value}: the model has {layers} layers, choose 1..{layers - 1}")
    return value


def default_speculations(device: torch.device) -> int:
    """On a CPU a window of three or four tokens costs little more than one, its weights' bytes, and larger ones cost
    multiplications: at a 1B shape two drafts gave 1.42 x, three 1.54 x, four 1.15 x (benchmarks/results).
    """
    return 3 if device.type == "cpu" else 6


def speculations(value: int | None, default: int) -> int:
    value = whole("num_speculations", default if value is None else value, 0)
    if value > 63:
        raise ValueError(f"num_speculations={value}: choose 0..63")
    return value


def whole(name: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={shown(value)}: must be a whole number")
    if value < low:
        raise ValueError(f"{name}={value}: must be at least {low}")
    return value


def true_or_false(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: must be True or False")
    return value


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def number(name: str, value: float, valid: Callable[[float], bool], allowed: str) -> float:
    """As float. `allowed` says in words which numbers are `valid`; NaN and what is too large for a float never are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={shown(value)}: must be a number, {allowed}")
    try:
        converted = float(value)
    except OverflowError:
        converted = float("inf")
    if not (abs(converted) < float("inf") and valid(converted)):
        raise ValueError(f"{name}={shown(value)}: must be {allowed}")
    return converted


def eos_ids(value, config) -> tuple[int, ...]:
    if value is None:
        return config.eos_token_ids
    ids = (value,) if isinstance(value, int) else value
    allowed = f"choose token ids in 0..{config.vocab_size - 1}"
    if isinstance(ids, (str, bytes, dict, torch.Tensor)) or not isinstance(ids, Iterable):
        raise TypeError(f"eos_token_id={shown(value)}: {allowed}")
    ids = tuple(ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"eos_token_id={shown(token)}: {allowed}")
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"eos_token_id={shown(token)}: {allowed}")
    return ids


def check_streamer(streamer: Any, prompts: int) -> None:
    if streamer is None:
        return
    if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")) or isinstance(
        streamer, torch.Tensor
    ):
        raise TypeError(f"streamer={shown(streamer)}: needs the methods put(ids) and end() of transformers' streamers")
    if prompts != 1:
        raise ValueError(f"streamer: works for one prompt, got {prompts}")


def sampling(count: int, sample, temperature, top_k, top_p, min_p, seed) -> list[SamplingOptions | None]:
    if not true_or_false("sample", sample):
        return [None] * count
    temperature = number("temperature", temperature, lambda t: t >= 0, "0 or more")
    whole("top_k", top_k, 0)
    top_k = min(top_k, 2**31 - 1)  # more than any vocabulary
    top_p = number("top_p", top_p, lambda p: 0 < p <= 1, "above 0 and at most 1")
    min_p = number("min_p", min_p, lambda p: 0 <= p <= 1, "in 0..1")
    return [SamplingOptions(temperature, top_k, top_p, *key, min_p) for key in keys(count, seed)]


def keys(count: int, seed: int | Sequence[int] | None) -> list[tuple[int, int]]:
    """(seed, stream) of each of `count` requests."""
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
    if isinstance(seed, torch.Tensor) and seed.dim() == 1 and not seed.is_meta:
        seed = seed.tolist()
    if isinstance(seed, int):
        pairs = [(seed, i) for i in range(count)]
    elif not isinstance(seed, Sequence) or isinstance(seed, (str, bytes)):
        raise TypeError(f"seed={shown(seed)}: must be a whole number, or a list of one for each prompt")
    elif len(seed) == count:
        pairs = [(s, 0) for s in seed]
    else:
        raise ValueError(f"seed: {len(seed)} values for {count} prompts, give one number or one for each")
    for value, _ in pairs:
        whole("seed", value, value)
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed={value}: must fit in 64 bits")
    return pairs
