"""Arguments of the harness in ours."""

from __future__ import annotations

from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from layerskip_kernels.messages import shown

TOGETHER = 8  # prompts, where nobody says how many
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
# what some tasks ask for that is so anyway
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


def generate_arguments(gen_kwargs: dict[str, Any], max_gen_toks: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `SelfSpeculativeDecoder.generate`, and the texts that end an answer, from a task's
    `generation_kwargs`; `max_gen_toks` and `seed` where it names none.

    Raises ValueError for one that `generate` has nothing for.
    """
    given = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    until = [text for text in given.pop("until") if text]
    options = {
        "max_new_tokens": given.pop("max_gen_toks"),
        "sample": given.pop("do_sample"),
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": given.pop("seed", seed),
    }
    for name, value in given.items():
        if name in SAMPLING:
            options |= {} if value is None else {name: value}
        elif name not in NEUTRAL or value != NEUTRAL[name]:
            known = ("until", "max_gen_toks", "do_sample", "seed", *SAMPLING)
            raise ValueError(f"generation_kwargs {name}={shown(value)}: choose from {', '.join(known)}")
    return options, until


def prompts_together(batch_size: int | str, max_batch_size: int | None) -> int:
    """How many, from the harness's `--batch_size` ("auto", "auto:4" or a number) and `--max_batch_size`."""
    if max_batch_size is not None:
        return max_batch_size
    if isinstance(batch_size, str):
        if batch_size.startswith("auto"):
            return TOGETHER
        if not batch_size.isdecimal():
            raise ValueError(f"batch_size={shown(batch_size)}: must be auto or a whole number")
    return int(batch_size)
