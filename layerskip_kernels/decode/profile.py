"""Where the time of decoding goes: seconds, calls and bytes of weights of each phase of a round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from layerskip_kernels.decode.model import Model


@dataclass
class Phase:
    """Attributes:
    seconds: spent in it, all calls together.
    calls: how often it ran.
    weight_bytes: of weights read, all calls together.
    """

    seconds: float = 0.0
    calls: int = 0
    weight_bytes: int = 0


class ProfiledModel:
    """A model on the CPU, for rounds alone, whose phases are timed; in all else the model itself.

    Args:
        model: the model.
        exit_layer: E of the drafts; None where there are none.
        phases: receives name -> `Phase`, in the order of their first run. What a round takes besides is Python.
    """

    def __init__(self, model: Model, exit_layer: int | None, phases: dict[str, Phase]):
        self._model, self._exit_layer, self._phases = model, exit_layer, phases
        timed = {
            "verify_tokens": self._timed("accept", model.ops.verify_tokens),
            "verify_rejection": self._timed("accept", model.ops.verify_rejection),
            "kv_rollback": self._timed("roll back", model.ops.kv_rollback),
        }
        self.ops = SimpleNamespace(**{**vars(model.ops), **timed})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_layers(self, first: int, last: int, *args: Any, drafts: bool = False, **where: Any) -> None:
        size = self._model.layer_bytes(first, last, drafts)
        name = self._name("layers", last == self._exit_layer)
        self._timed(name, self._model.run_layers, size)(first, last, *args, drafts=drafts, **where)

    def head(self, *args: Any, **options: Any) -> None:
        size = self._model.head_bytes()
        self._timed(self._name("head", False), self._model.head, size)(*args, **options)

    def draft_head(self, *args: Any, **options: Any) -> None:
        size = self._model.head_bytes(drafts=True)
        self._timed(self._name("head", True), self._model.draft_head, size)(*args, **options)

    def _name(self, part: str, drafts: bool) -> str:
        if self._exit_layer is None:
            return part
        return f"draft {part}" if drafts else f"verify {part}"

    def _timed(self, name: str, function: Callable[..., Any], weight_bytes: int = 0) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            seconds = time.perf_counter() - started
            phase = self._phases.setdefault(name, Phase())
            phase.seconds += seconds
            phase.calls += 1
            phase.weight_bytes += weight_bytes
            return result

        return timed
