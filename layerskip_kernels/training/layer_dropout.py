"""Per-sample layer dropout (section 4.1.1 of the paper): a dropped sample skips the layer and pays nothing for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from layerskip_kernels.training.parts import model_parts

TIME_SCHEDULES = ("constant", "exponential")
_PER_SAMPLE = ("attention_mask", "position_ids", "position_embeddings")


def layer_schedule(layer: int, num_layers: int) -> float:
    """D(l) = exp(l · ln 2 / (L - 1)) - 1: 0 at the first layer, 1 at the last."""
    if num_layers < 2:
        raise ValueError(f"num_layers={num_layers}: layer dropout needs at least 2")
    return math.exp(layer * math.log(2) / (num_layers - 1)) - 1


def time_schedule(step: int, total_steps: int, schedule: str) -> float:
    """S(t): 1 for "constant" (continual training, fine-tuning); exp(t · ln 2 / (T - 1)) - 1 for "exponential"
    (from scratch), 0 at the first step and 1 at the last."""
    if schedule == "constant":
        return 1.0
    if schedule != "exponential":
        raise ValueError(f"schedule={schedule!r}: choose {', '.join(TIME_SCHEDULES)}")
    last = max(total_steps - 1, 1)
    return math.exp(min(step, last) * math.log(2) / last) - 1


def dropout_rate(
    layer: int, num_layers: int, max_rate: float, step: int = 0, total_steps: int = 1, schedule: str = "constant"
) -> float:
    """p(l, t) = S(t) · D(l) · p_max: the probability that a sample skips `layer` at `step`."""
    return time_schedule(step, total_steps, schedule) * layer_schedule(layer, num_layers) * max_rate


class LayerDropout:
    """Makes the decoder layers of a model skip samples while it trains; as a context manager, it leaves no trace.

    >>> with LayerDropout(model, max_rate=0.1, total_steps=1000) as dropout:
    ...     for step in range(1000):
    ...         dropout.set_step(step)
    ...         model(**batch, use_cache=False).loss.backward()

    In eval mode nothing is dropped. What is dropped is a function of (seed, rank, step) and the order of the forward
    passes within the step, so a resumed run drops the same. Masks are drawn outside of checkpointed regions.

    Args:
        model: a supported transformers causal language model, plain or wrapped (DistributedDataParallel, PEFT).
        max_rate: p_max in 0..1.
        total_steps: T; used by the "exponential" schedule.
        schedule: "constant" or "exponential", see `time_schedule`.
        seed: >= 0.
        rank: of this process in data-parallel training, so that ranks drop independently.
    """

    def __init__(
        self,
        model: nn.Module,
        max_rate: float,
        *,
        total_steps: int = 1,
        schedule: str = "constant",
        seed: int = 0,
        rank: int = 0,
    ):
        if not 0 <= max_rate <= 1:
            raise ValueError(f"max_rate={max_rate}: choose 0..1")
        time_schedule(0, total_steps, schedule)
        self.layers = model_parts(model).layers
        layer_schedule(0, len(self.layers))
        self.max_rate, self.total_steps, self.schedule = max_rate, total_steps, schedule
        self.seed, self.rank = seed, rank
        self._generator = torch.Generator()
        self._replaced: list[tuple[nn.Module, Callable | None]] = []
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Starts the draws of optimizer step `step`, counted from 0."""
        self.step = step
        state = numpy.random.SeedSequence([self.seed, self.rank, step]).generate_state(1, numpy.uint64)
        self._generator.manual_seed(int(state[0]) >> 1)

    def rate(self, layer: int) -> float:
        """p(l, t) at the current step."""
        return dropout_rate(layer, len(self.layers), self.max_rate, self.step, self.total_steps, self.schedule)

    def attach(self) -> LayerDropout:
        if self._replaced:
            raise RuntimeError("layer dropout is already attached")
        for index, layer in enumerate(self.layers):
            self._replaced.append((layer, layer.__dict__.get("forward")))
            # `forward` of the instance, not hooks: a hook cannot keep a layer from running. It wraps the checkpointed
            # function too, so a recomputation finds the samples already chosen.
            layer.forward = partial(self._forward, index, layer, layer.forward)
        return self

    def detach(self) -> None:
        """Gives the layers their own forward back; does nothing where none is attached."""
        while self._replaced:
            layer, forward = self._replaced.pop()
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward

    def __enter__(self) -> LayerDropout:
        return self.attach()

    def __exit__(self, *exception) -> None:
        self.detach()

    def _forward(self, index: int, layer: nn.Module, forward: Callable, hidden: Tensor, *args, **kwargs):
        rate = self.rate(index) if layer.training else 0.0
        if not rate:
            return forward(hidden, *args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ValueError("use_cache=True: layer dropout leaves gaps in a KV cache, pass use_cache=False")
        batch = hidden.shape[0]
        kept = (torch.rand(batch, generator=self._generator) >= rate).nonzero()[:, 0].to(hidden.device)
        if len(kept) == batch:
            return forward(hidden, *args, **kwargs)
        if not len(kept):
            return hidden
        kwargs.update({name: _select(name, kwargs[name], kept, batch) for name in _PER_SAMPLE if name in kwargs})
        output = forward(hidden.index_select(0, kept), *args, **kwargs)
        if isinstance(output, tuple):
            return hidden.index_copy(0, kept, output[0].to(hidden.dtype)), *output[1:]
        return hidden.index_copy(0, kept, output.to(hidden.dtype))


def _select(name: str, value: Any, kept: Tensor, batch: int) -> Any:
    """The rows `kept` of an argument that has one row per sample; as it is, if all samples share it."""
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return type(value)(_select(name, item, kept, batch) for item in value)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}: layer dropout selects samples of tensors, load the model with "
            'attn_implementation="sdpa", "eager" or "flash_attention_2"'
        )
    return value.index_select(0, kept) if value.shape[0] == batch else value
