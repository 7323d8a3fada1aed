"""What the phases of a round cost on this machine, and what that predicts for every (E, K)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.graphs import CudaDevice
from layerskip_kernels.measure.settings import Setting
from layerskip_kernels.ops import ExitHead

_ROUNDS = 8  # of a text that is decoded to time whole ones
REPEATS = 16  # a figure is the least of so many, taken in turns with all others: the machine undisturbed


@dataclass(frozen=True)
class Costs:
    """Seconds of each phase for `batch_size` sequences together, at one context length.

    `widths` are the window sizes measured; between them costs are interpolated.
    """

    num_layers: int
    batch_size: int
    context: int
    widths: list[int]
    layer: list[float]  # one layer over the window
    layers_call: list[float]  # what a run of layers costs besides
    head: list[float]  # final norm and LM head on every row of the window
    draft_layer: float  # one layer over one token, as it drafts
    draft_head: float  # final norm and the head that drafts
    plain_overhead: float  # of an autoregressive step: what is neither layers nor head
    round_overhead: float  # of a self-speculative round, the same
    draft_overhead: float  # of every draft, the same
    copies_draft: bool = False  # then verification runs all layers, else those behind the exit

    def layers(self, count: int, width: float) -> float:
        """Seconds of `count` layers over a window of `width` tokens."""
        return float(
            np.interp(width, self.widths, self.layers_call) + count * np.interp(width, self.widths, self.layer)
        )

    def heads(self, width: float) -> float:
        return float(np.interp(width, self.widths, self.head))

    def step(self) -> float:
        """Seconds of an autoregressive step."""
        return self.layers(self.num_layers, 1) + self.heads(1) + self.plain_overhead

    def round(self, exit_layer: int, num_speculations: float) -> float:
        """Seconds of a round: K drafts, the early layers over the last one, verification of K + 1."""
        width = num_speculations + 1
        early = self.layers_call[0] + exit_layer * self.draft_layer
        draft = num_speculations * (early + self.draft_head + self.draft_overhead)
        if self.copies_draft:
            verify = self.layers(self.num_layers, width)
        else:
            verify = early + self.layers(self.num_layers - exit_layer, width)
        return draft + verify + self.heads(width) + self.round_overhead

    def speedup(self, setting: Setting) -> float:
        """Predicted speed of self-speculative over autoregressive decoding."""
        return setting.tokens_per_round * self.step() / self.round(setting.exit_layer, setting.num_speculations)


@torch.inference_mode()
def measure_costs(
    decoder: Any,
    prompt: Sequence[int],
    max_speculations: int,
    *,
    repeats: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Costs:
    """Times layers and head over windows of 1..max_speculations + 1 tokens, and whole rounds for what is left over.

    Works at the decoder's `max_batch_size` and just behind the prompt.
    `tick()` is called `repeats` + 1 times.
    """
    batch, layers = decoder.max_batch_size, decoder.config.num_layers
    context = len(prompt) + _ROUNDS
    widths = sorted({*range(1, min(max_speculations, 8) + 2), *range(1, max_speculations + 2, 4), max_speculations + 1})
    phases = _Phases(decoder, batch, context, widths[-1])
    half = max(1, layers // 2)
    probes: dict[Any, Callable[[], float]] = {}
    for width in widths:
        probes["layers", width] = phases.timer(partial(phases.layers, layers, width))
        probes["half", width] = phases.timer(partial(phases.layers, half, width))
        probes["head", width] = phases.timer(partial(phases.head, width, phases.model.head))
    exit_layer = decoder.exit_layer
    if phases.model.copies_draft(batch):
        probes["draft layers"] = phases.timer(partial(phases.layers, exit_layer, 1, drafts=True))
    probes["draft head"] = phases.timer(partial(phases.head, 1, phases.model.draft_head))
    # whole rounds too, the shortest ones, as a busy machine interrupts the others
    probes["plain"] = partial(_round, decoder, prompt, 0)
    probes["round"] = partial(_round, decoder, prompt, 1)
    times: dict[Any, list[float]] = {name: [] for name in probes}
    for repeat in range((repeats or REPEATS) + 1):
        for name, probe in probes.items():
            seconds = probe()
            if repeat:  # the first one warms up
                times[name].append(seconds)
        tick()
    least = {name: min(seconds) for name, seconds in times.items()}
    whole_stack, half_stack, heads = (_rising([least[what, w] for w in widths]) for what in ("layers", "half", "head"))
    layer = half_stack / layers
    if layers > half:
        # a run of layers has costs of its own, but never less than none
        layer = np.clip((whole_stack - half_stack) / (layers - half), 0.0, whole_stack / layers)
    calls = whole_stack - layers * layer
    copies_draft = "draft layers" in least
    draft_layer = max(0.0, least["draft layers"] - calls[0]) / exit_layer if copies_draft else layer[0]
    measured = layer.tolist(), calls.tolist(), heads.tolist(), float(draft_layer), least["draft head"]
    bare = Costs(layers, batch, context, widths, *measured, 0.0, 0.0, 0.0, copies_draft)
    # a round does once what an autoregressive step does besides layers and head; what it takes more is the draft's
    plain = max(0.0, least["plain"] - bare.step())
    once_and_draft = max(0.0, least["round"] - bare.round(exit_layer, 1))
    once = min(plain, once_and_draft)
    return replace(bare, plain_overhead=plain, round_overhead=once, draft_overhead=once_and_draft - once)


def _rising(seconds: Sequence[float]) -> np.ndarray:
    """Of windows in rising width: a narrow one takes no longer than a wider one; what does was disturbed."""
    return np.minimum.accumulate(np.asarray(seconds)[::-1])[::-1]


def _round(decoder: Any, prompt: Sequence[int], drafts: int) -> float:
    """The least seconds of a round with that many drafts, of as many sequences as the decoder takes.

    They are all the same prompt, so that they go on side by side.
    """
    how = {"num_speculations": drafts} if drafts else {"generation_strategy": "autoregressive"}
    prompts = [list(prompt)] * decoder.max_batch_size
    # so many tokens that _ROUNDS rounds have room for all drafts, whatever is accepted
    stats = decoder.generate(
        prompts, max_new_tokens=_ROUNDS * (drafts + 1) + 1, eos_token_id=[], repetition_penalty=1, **how
    ).stats
    return min(stats.round_seconds[1:_ROUNDS])  # the first one makes its buffers


class _Phases:
    """Layers and head on made-up hidden states, as a round runs them."""

    def __init__(self, decoder: Any, batch: int, context: int, width: int):
        self.model, self.batch = decoder.model, batch
        device, config = self.model.device, self.model.config
        self.cache = KVCache(config, batch, context + width, self.model.dtype, device)
        self.cache.k.zero_()
        self.cache.v.zero_()
        self.model.rope.reserve(context + width)
        self.hidden = torch.randn(batch, width, config.hidden_size, device=device).to(self.model.dtype)
        self.positions = torch.arange(context, context + width, dtype=torch.int32, device=device).repeat(batch, 1)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.slots = torch.arange(batch, dtype=torch.int32, device=device)
        self.tokens = torch.empty(batch * width, dtype=torch.int64, device=device)
        self.figures = torch.empty(2, batch * width, device=device)

    def layers(self, count: int, width: float, drafts: bool = False) -> None:
        rope, positions = self.model.rope, self.positions[:, :width].contiguous()
        self.model.run_layers(
            0,
            count,
            self.hidden[:, :width].contiguous(),
            self.cache,
            drafts=drafts,
            lengths=self.lengths,
            positions=positions,
            inv_freq=rope.rows(positions) if rope.position_dependent else rope.inv_freq,
            slot_ids=self.slots,
        )

    def head(self, width: int, head: Callable[..., None]) -> None:
        rows = self.batch * width
        out = ExitHead(self.tokens[:rows], self.figures[0, :rows], self.figures[1, :rows])
        head(self.hidden.view(-1, self.hidden.shape[-1])[:rows], None, out)

    def timer(self, phase: Callable[[], None]) -> Callable[[], float]:
        """Seconds of one run of a phase; on a GPU in a CUDA graph, as decoding runs it."""
        phase()  # what kernels prepare once must not be captured
        if self.model.device.type != "cuda":
            return lambda: _seconds(phase)
        replay = CudaDevice(self.model.device).capture(phase)
        return lambda: _seconds(replay, lambda: torch.cuda.synchronize(self.model.device))


def _seconds(phase: Callable[[], None], wait: Callable[[], None] = lambda: None) -> float:
    wait()
    started = time.perf_counter()
    phase()
    wait()
    return time.perf_counter() - started
