from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from layerskip_kernels.decode.arguments import number
from layerskip_kernels.decode.batch import Request
from layerskip_kernels.messages import shown


class Processing:
    """What `generate` was told about logits processors and stopping criteria; transformers' own do the work."""

    def __init__(
        self,
        logits_processor: Any,
        stopping_criteria: Any,
        repetition_penalty: float,
        min_new_tokens: int,
        eos_ids: Sequence[int],
        output_logits: bool,
    ):
        self.processors = _callables("logits_processor", logits_processor)
        self.criteria = _callables("stopping_criteria", stopping_criteria)
        penalty = number("repetition_penalty", repetition_penalty, lambda p: p > 0, "above 0, 1 is off")
        self.repetition_penalty, self.min_new_tokens, self.eos_ids = penalty, min_new_tokens, eos_ids
        # Alone, the penalty is the head's; among others it has its place in transformers' order.
        self._penalizes = penalty != 1 and bool(self.processors or self._delays_eos or output_logits)

    @property
    def needed(self) -> bool:
        return bool(self.criteria or self.processors or self._penalizes or self._delays_eos)

    @property
    def _delays_eos(self) -> bool:
        return self.min_new_tokens > 0 and bool(self.eos_ids)

    def for_request(self, request: Request, device) -> tuple[Callable | None, Callable | None]:
        """Processors and criteria, each None where there is none; in transformers' order."""
        from transformers import LogitsProcessorList, StoppingCriteriaList
        from transformers.generation import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

        processors = LogitsProcessorList()
        if self._penalizes:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self._delays_eos:
            processors.append(
                MinNewTokensLengthLogitsProcessor(
                    len(request.prompt), self.min_new_tokens, list(self.eos_ids), device=str(device)
                )
            )
        processors += self.processors
        return processors or None, StoppingCriteriaList(map(_Criterion, self.criteria)) or None


class _Criterion:
    """A stopping criterion whose answer is looked at before transformers' list combines it with others."""

    def __init__(self, criterion: Callable):
        self.criterion = criterion

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool | torch.Tensor:
        met = self.criterion(ids, scores, **kwargs)
        if not (isinstance(met, (bool, np.bool_)) or (isinstance(met, torch.Tensor) and met.dtype == torch.bool)):
            raise TypeError(
                f"stopping_criteria: returned {shown(met)}, expected True or False, or a bool tensor of them"
            )
        return met


def _callables(name: str, value: Any) -> Sequence[Callable]:
    """A single one, or several in a list such as `LogitsProcessorList`, which can be called too."""
    items = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for item in items:
        if not callable(item):
            raise TypeError(
                f"{name}: {type(item).__name__} can't be called, give functions as transformers defines them"
            )
    return items
