"""transformers' own generation on the same prompts, as `benchmark` times it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerskip_kernels.measure.benchmark import Call, Way

PLAIN, EARLY_EXIT = "transformers", "assistant_early_exit"


class _FirstToken:
    """A streamer that notes when the first new token comes; transformers puts the prompt first."""

    def __init__(self):
        self.puts, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def transformers_ways(decoder: Any, folder: Path, options: dict[str, Any]) -> dict[str, Way]:
    """Plain and `assistant_early_exit` generation of the checkpoint, in the decoder's dtype on its device.

    Both take one prompt at a time, as `assistant_early_exit` must; it drafts with the decoder's E and K. `options` are
    those of our `generate`.
    """
    from transformers import AutoModelForCausalLM, StopStringCriteria
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its advice about its own nested calls, once for every one
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=decoder.dtype).to(decoder.device).eval()
    eos = options.get("eos_token_id") or list(decoder.config.eos_token_ids)
    common = dict(
        max_new_tokens=options["max_new_tokens"],
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
        do_sample=options["sample"],
    )
    if (penalty := options.get("repetition_penalty")) is not None:  # else both take the checkpoint's
        common["repetition_penalty"] = penalty
    if options["stop_strings"]:
        # not stop_strings=: the nested call of assistant_early_exit would ask for a tokenizer that it is not given
        common["stopping_criteria"] = [StopStringCriteria(decoder.tokenizer, options["stop_strings"])]
    if options["sample"]:
        common |= dict(temperature=options["temperature"], top_k=options["top_k"], top_p=options["top_p"])
    else:
        common |= dict(temperature=None, top_k=None, top_p=None)
    model.generation_config.num_assistant_tokens = decoder.num_speculations
    model.generation_config.num_assistant_tokens_schedule = "constant"

    def way(more: dict[str, Any]) -> Way:
        def decode(prompts: Sequence[Any], first: int) -> Call | None:
            call = Call(list(range(first, first + len(prompts))), [], [], 0.0, 0.0, 0)
            for number, prompt in enumerate(prompts, first):
                ids = decoder.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
                _decode(model, ids, decoder, common | more, (options.get("seed") or 0) + number, call)
            return call

        return decode

    return {PLAIN: way({}), EARLY_EXIT: way({"assistant_early_exit": decoder.exit_layer})}


@torch.inference_mode()
def _decode(model: Any, ids: list[int], decoder: Any, options: dict[str, Any], seed: int, call: Call) -> None:
    torch.manual_seed(seed)
    prompt = torch.tensor([ids], device=decoder.device)
    streamer = _FirstToken()
    started = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **options)
    new = out[0, len(ids) :].tolist()
    ended = time.perf_counter()
    call.sequences.append(new)
    call.texts.append(decoder.tokenizer.decode(new, skip_special_tokens=True))
    call.time_to_first_token += streamer.at - started
    call.decode_seconds += ended - streamer.at
    call.decode_tokens += len(new) - 1
