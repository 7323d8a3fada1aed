"""transformers' `generate` for decoder-only models, run by our decoder."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from typing import Any

import torch

from layerskip_kernels.decode.arguments import keys
from layerskip_kernels.decode.batch import SamplingOptions
from layerskip_kernels.decode.stop import StopStrings
from layerskip_kernels.integrations.decoders import decoder_for
from layerskip_kernels.integrations.transformers_inputs import Unsupported, check_supported, read_inputs
from layerskip_kernels.integrations.transformers_outputs import build_output
from layerskip_kernels.integrations.transformers_processors import Processing
from layerskip_kernels.models.loading import check_class


def generate(
    model: Any,
    input_ids: torch.Tensor | None = None,
    *,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    seed: int | list[int] | None = None,
    generation_strategy: str = "self_speculative",
    deterministic_prefill: bool = False,
    backend: str = "auto",
    tokenizer: Any = None,
    streamer: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    **model_kwargs: Any,
) -> Any:
    """What `model.generate` does for decoder-only models, by LayerSkip self-speculative decoding.

    Call it, `lk.generate(model, **inputs, ...)`, with anything `model.generate` takes, or hand it to transformers:
    `model.generate(**inputs, custom_generate=lk.generate, exit_layer=4)`. In the latter transformers itself refuses
    `stop_strings`, as it keeps the `tokenizer` from such a function: call it directly for these. The model is never
    modified.

    Args:
        model: a causal language model of transformers of a supported family.
        input_ids: [B, P] int64 prompts, left-padded where their lengths differ, with their `attention_mask`.
        exit_layer: E, 1..L-1; None: `assistant_early_exit`, else the value recorded with the checkpoint, else L // 4.
        num_speculations: K, drafted tokens per round; None: the recorded value, else 3 on a CPU and 6 on a GPU.
        seed: of sampling: one for the call, or one for each sequence. None: drawn from torch's generator.
        generation_strategy, deterministic_prefill, backend: as in `SelfSpeculativeDecoder`.
        tokenizer: needed by `stop_strings`.
        streamer, logits_processor, stopping_criteria, generation_config, model_kwargs: as in `model.generate`.

    Returns:
        As `model.generate`: int64 [B, P + new], or `GenerateDecoderOnlyOutput` with `return_dict_in_generate`;
        that has an attribute `stats`, too, a `GenerationStats`.

    Raises:
        Unsupported (a ValueError): beam search, `inputs_embeds`, masks with holes and other things not supported.
        ValueError, TypeError: as `model.generate` and `SelfSpeculativeDecoder.generate`.
    """
    ours = dict(
        exit_layer=exit_layer,
        num_speculations=num_speculations,
        seed=seed,
        generation_strategy=generation_strategy,
        deterministic_prefill=deterministic_prefill,
        backend=backend,
        streamer=streamer,
    )
    if hasattr(generation_config, "_pad_token_tensor"):  # transformers' `generate` has prepared everything
        if streamer is None:
            ours.update(streamer=_callers_streamer(sys._getframe(1)), prompt_is_put=True)
        return _decode(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **ours,
            **model_kwargs,
        )
    model = getattr(model, "_orig_mod", model)
    check_class(model)
    if model_kwargs.get("custom_generate") is not None:
        raise ValueError("custom_generate: lk.generate is one itself, leave it out")
    if "inputs" in model_kwargs and input_ids is not None:
        raise ValueError("inputs: input_ids is given, too, leave one out")
    if input_ids is not None:
        model_kwargs["input_ids"] = input_ids
    stopping_criteria = _with_stop_strings(model, tokenizer, stopping_criteria, generation_config, model_kwargs)
    return type(model).generate(
        model,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        custom_generate=functools.partial(_decode, **ours),
        **model_kwargs,
    )


def _callers_streamer(caller: types.FrameType) -> Any:
    """The streamer that `model.generate` was called with. It puts the prompt there, but does not hand it on to a custom
    function, and without a word nothing else would be streamed.
    """
    from transformers import GenerationMixin

    if caller.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        return None
    return caller.f_locals.get("streamer")


def _with_stop_strings(model, tokenizer, criteria, generation_config, model_kwargs: dict) -> Any:
    """transformers would ask for a tokenizer, and takes none along with a custom function."""
    from transformers import StoppingCriteriaList
    from transformers.generation import StopStringCriteria

    strings = model_kwargs.get("stop_strings")
    for config in (generation_config, model.generation_config):
        strings = strings or getattr(config, "stop_strings", None)
    if not strings:
        return criteria
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r}: give the tokenizer, too")
    model_kwargs["stop_strings"] = None
    return StoppingCriteriaList([StopStringCriteria(tokenizer, strings), *(criteria or ())])


def _decode(
    model: Any,
    input_ids: torch.Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    seed: int | list[int] | None = None,
    generation_strategy: str = "self_speculative",
    deterministic_prefill: bool = False,
    backend: str = "auto",
    streamer: Any = None,
    prompt_is_put: bool = False,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop that transformers' `generate` calls with all inputs prepared."""
    config = generation_config
    check_supported(config, model_kwargs, streamer, input_ids)
    wants_scores = bool(config.return_dict_in_generate and config.output_scores)
    wants_logits = bool(config.return_dict_in_generate and config.output_logits)
    processing = Processing(logits_processor, stopping_criteria, config.do_sample, wants_scores or wants_logits)
    inputs = read_inputs(model, input_ids, config, processing.max_length, generation_strategy, model_kwargs)
    decoder = decoder_for(model, backend)
    for request, shown in zip(inputs.requests, inputs.input_ids.tolist()):  # padding included, as in transformers
        request.repetition_penalty = processing.repetition_penalty
        request.penalized = [token for token in shown if 0 <= token < decoder.config.vocab_size]
    if config.do_sample:
        for request, key in zip(inputs.requests, keys(len(inputs.requests), seed)):
            request.sampling = SamplingOptions(**processing.warpers, seed=key[0], stream=key[1])
    pad = None if config._pad_token_tensor is None else int(config._pad_token_tensor)
    controlled = processing.control(inputs, pad, wants_scores, decoder.device)
    stats = decoder.run(
        inputs.requests,
        generation_strategy=generation_strategy,
        exit_layer=exit_layer if exit_layer is not None else config.assistant_early_exit,
        num_speculations=num_speculations,
        eos_ids=processing.eos_ids,
        stop=StopStrings(None, None),
        streamer=None if streamer is None else OneByOne(streamer, None if prompt_is_put else input_ids.cpu()),
        deterministic_prefill=deterministic_prefill,
        output_logits=wants_logits or (wants_scores and not controlled),
    )
    if any(request.finish_reason == "interrupted" for request in inputs.requests):
        raise KeyboardInterrupt
    output = build_output(inputs, pad, config, wants_scores, wants_logits)
    if config.return_dict_in_generate:
        output.stats = stats
    return output


class OneByOne:
    """Hands a streamer what transformers hands it: the prompt as [1, P], if it is given, then every token by itself."""

    def __init__(self, streamer: Any, prompt: torch.Tensor | None):
        self.streamer, self.prompt, self.started = streamer, prompt, False
        if hasattr(streamer, "put_draft"):
            self.put_draft = streamer.put_draft

    def put(self, ids: torch.Tensor) -> None:
        if self.started:
            for token in ids:
                self.streamer.put(token[None])
        elif self.prompt is not None:
            self.streamer.put(self.prompt)
        self.started = True

    def end(self) -> None:
        self.streamer.end()


__all__ = ["Unsupported", "generate"]
