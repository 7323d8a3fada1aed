"""Which of transformers' processors and criteria the decoder does itself, and how the others are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerskip_kernels.decode.controls import Controls
from layerskip_kernels.decode.stop import StopStrings
from layerskip_kernels.integrations.transformers_inputs import Inputs

# in the order in which the fused sampling applies them, with their values when absent
_WARPERS = {
    "TemperatureLogitsWarper": ("temperature", 1.0),
    "TopKLogitsWarper": ("top_k", 0),
    "TopPLogitsWarper": ("top_p", 1.0),
    "MinPLogitsWarper": ("min_p", 0.0),
}
# Of these, a row's result depends on that row's ids and scores alone, so rows need not wait for each other.
_ROW_BY_ROW = {
    *_WARPERS,
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MaxTimeCriteria",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "StopStringCriteria",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TypicalLogitsWarper",
}


class Processing:
    """The processors and criteria of one call.

    Attributes:
        warpers: what fused sampling gets: temperature, top_k, top_p, min_p.
        repetition_penalty: of drafts; of the model's own tokens too where no processor is left.
        eos_ids, max_length: from the criteria that the decoder replaces.
        processors, criteria: what is left of the lists.
    """

    def __init__(
        self, processors: Sequence[Any] | None, criteria: Sequence[Any] | None, sample: bool, keep_logits: bool
    ):
        """`keep_logits`: the caller wants logits or scores, so the head must not apply the penalty."""
        self.processors, self.warpers = _fused(list(processors or ()), sample)
        self.repetition_penalty = next((p.penalty for p in self.processors if _is_whole_penalty(p)), 1.0)
        if len(self.processors) == 1 and self.repetition_penalty != 1 and not keep_logits:
            self.processors = []
        self.eos_ids: tuple[int, ...] = ()
        self.has_eos, self.criteria, lengths = False, [], []
        for criterion in criteria or ():
            if _name(criterion) == "MaxLengthCriteria":
                lengths.append(criterion.max_length)
            elif _name(criterion) == "EosTokenCriteria":
                self.eos_ids += tuple(criterion.eos_token_id.flatten().tolist())
                self.has_eos = True
            else:
                self.criteria.append(criterion)
        self.max_length = min(lengths)

    def control(self, inputs: Inputs, pad: int | None, keep_scores: bool, device: torch.device) -> bool:
        """Put the requests under their processors and criteria; False when there is none.

        Rows that can be told apart run on their own, with [1, length] ids, padding included. Otherwise all go in step,
        as in a plain decode, and the others see what they would see there.
        """
        from transformers import LogitsProcessorList, StoppingCriteriaList

        if not self.processors and not self.criteria:
            return False
        requests, shown = inputs.requests, inputs.input_ids.tolist()
        alone = all(_is_row_by_row(item) for item in (*self.processors, *self.criteria))
        # without an end-of-sequence token, transformers decodes ended rows on until all have ended
        alone = alone and (self.has_eos or not self.criteria)
        groups = [[i] for i in range(len(requests))] if alone else [list(range(len(requests)))]
        for group in groups:
            Controls(
                [requests[i] for i in group],
                LogitsProcessorList(self.processors) or None,
                StoppingCriteriaList(self.criteria) or None,
                stop=StopStrings(None, None),
                eos_ids=self.eos_ids,
                device=device,
                shown=[shown[i] for i in group],
                fill=pad if self.has_eos else None,
                keep_scores=keep_scores,
            )
        return True


def _fused(processors: list[Any], sample: bool) -> tuple[list[Any], dict[str, Any]]:
    """Takes the warpers off the end of the list, as far as they stand in the order of fused sampling."""
    values = dict(_WARPERS.values())
    order = list(_WARPERS)
    last = len(order)
    while sample and processors and _name(processors[-1]) in order[:last]:
        warper = processors[-1]
        if getattr(warper, "filter_value", -torch.inf) != -torch.inf or getattr(warper, "min_tokens_to_keep", 1) != 1:
            break
        last = order.index(_name(warper))
        name, _ = _WARPERS[_name(warper)]
        values[name] = getattr(warper, name)
        processors = processors[:-1]
    return processors, values


def _name(item: Any) -> str | None:
    """The class of one of transformers' own; None for subclasses and other people's, which may do anything."""
    return type(item).__name__ if type(item).__module__.startswith("transformers.generation.") else None


def _is_whole_penalty(item: Any) -> bool:
    """A repetition penalty that holds for the prompt, too."""
    return _name(item) == "RepetitionPenaltyLogitsProcessor" and item.prompt_ignore_length is None


def _is_row_by_row(item: Any) -> bool:
    if _name(item) == "RepetitionPenaltyLogitsProcessor":
        return not isinstance(item.prompt_ignore_length, torch.Tensor)
    return _name(item) in _ROW_BY_ROW
