"""The first promise as a property: speculation, batch, slots, refills and threads change no bit of an answer.

Every example draws a model, prompts and how tokens are chosen, decodes each prompt alone and autoregressively, and then
all of them together in a drawn order. `property_settings.py` says how to try more examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from property_settings import ASKED, few
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode.generate import Generation
from layerskip_kernels.decode.prefill import SHORT_PROMPT

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LATE_SCALES = (0.02, 0.1, 1.0)  # an exit that agrees almost always, often, hardly ever

GREEDY = st.fixed_dictionaries({})
SAMPLED = st.fixed_dictionaries(
    {
        "sample": st.just(True),
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.5]),
        "top_k": st.sampled_from([0, 1, 5, 50]),
        "top_p": st.sampled_from([0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
    }
)
CONTROLLED = st.fixed_dictionaries(
    {}, optional={"repetition_penalty": st.sampled_from([0.8, 1.3]), "min_new_tokens": st.integers(1, 8)}
)
TOKENS = st.integers(0, VOCAB_SIZE - 1)
PROMPT = st.one_of(
    st.lists(TOKENS, min_size=1, max_size=12),
    st.builds(lambda ids, times: ids * times, st.lists(TOKENS, min_size=1, max_size=9), st.integers(2, 6)),
)


@dataclass
class Answer:
    tokens: list[int]
    logits: torch.Tensor  # [n, V] float32
    reason: str


@lru_cache(maxsize=64)
def model_of(family: str, dtype: torch.dtype, late_scale: float):
    return tiny_model(family, dtype=dtype, late_scale=late_scale)


class Shuffled:
    """Generations take their slots in a given order, of a cache that holds what no result may depend on."""

    def __init__(self, rank: list[int], poison: float):
        original = Generation.__init__

        def init(generation, workspace, *args, **kwargs):
            original(generation, workspace, *args, **kwargs)
            generation.free_slots.sort(key=lambda slot: rank[slot])
            workspace.cache.k.fill_(poison)
            workspace.cache.v.fill_(poison)

        self.patch = patch.object(Generation, "__init__", init)

    def __enter__(self):
        self.threads = torch.get_num_threads()
        self.patch.start()

    def __exit__(self, *exc_info):
        self.patch.stop()
        torch.set_num_threads(self.threads)


def answers(decoder, prompts, seeds, **options) -> list[Answer]:
    if options.get("sample"):
        options["seed"] = seeds
    result = decoder.generate(prompts, output_logits=True, **options)
    assert not result.interrupted, "a signal ended the answer: nothing to compare"
    return [Answer(*fields) for fields in zip(result.sequences, result.logits, result.finish_reasons)]


def assert_same_bits(got: Answer, expected: Answer, what: str) -> None:
    assert got.tokens == expected.tokens, what
    assert got.reason == expected.reason, what
    assert torch.equal(got.logits.view(torch.int32), expected.logits.view(torch.int32)), what


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16"])
@few(10)
@given(st.data())
def test_no_bit_of_an_answer_depends_on_how_it_was_decoded(dtype, data):
    draw = data.draw
    model = model_of(draw(st.sampled_from(FAMILIES), "family"), dtype, draw(st.sampled_from(LATE_SCALES), "late scale"))
    slots = draw(st.integers(1, 4), "slots")
    alone = lk.SelfSpeculativeDecoder.from_model(model, max_batch_size=1)
    copies = {name: draw(st.sampled_from(["shared", "int8", "int4"]), name) for name in ("draft_layers", "draft_head")}
    decoder = lk.SelfSpeculativeDecoder.from_model(model, max_batch_size=slots, **copies)

    prompts = draw(st.lists(PROMPT, min_size=1, max_size=6), "prompts")
    seeds = draw(st.lists(st.integers(0, 2**63 - 1), min_size=len(prompts), max_size=len(prompts)), "seeds")
    options = {**draw(st.one_of(GREEDY, SAMPLED), "sampling"), **draw(CONTROLLED, "controls"), "eos_token_id": []}
    options["max_new_tokens"] = draw(st.integers(1, 24), "new tokens")
    threads = draw(st.integers(1, 4 if ASKED else 2), "threads")  # more than there are cores take long
    # what torch's product makes of a long prompt depends on the number of threads, unless told otherwise
    torch_prefill = max(map(len, prompts)) >= SHORT_PROMPT and draw(st.booleans(), "prefill by torch")
    options["deterministic_prefill"] = not torch_prefill

    def one_by_one():
        return [
            answers(alone, [p], [s], generation_strategy="autoregressive", **options)[0] for p, s in zip(prompts, seeds)
        ]

    poison = draw(st.sampled_from([0.0, float("nan"), float("inf")]), "old cache")
    with Shuffled(draw(st.permutations(range(slots)), "slot order"), poison):
        torch.set_num_threads(threads if torch_prefill else 1)
        expected = one_by_one()
        if draw(st.booleans(), "sequences end in between"):
            ended = draw(st.sampled_from(expected), "which ends").tokens
            options["eos_token_id"] = draw(st.lists(st.sampled_from(ended), min_size=1, max_size=3), "end tokens")
            expected = one_by_one()

        torch.set_num_threads(threads)
        for number in range(2):
            order = draw(st.permutations(range(len(prompts))), f"order {number}")
            strategy = dict(
                generation_strategy="self_speculative",
                exit_layer=draw(st.integers(1, 3), f"E {number}"),
                num_speculations=draw(st.one_of(st.integers(0, 9), st.just(30)), f"K {number}"),
                draft_confidence=draw(st.sampled_from([None, None, 0.3, 0.9]), f"confidence {number}"),
                adaptive_speculations=draw(st.booleans(), f"K adapts {number}"),
            )
            if number and draw(st.booleans(), "autoregressive in a batch"):
                strategy = dict(generation_strategy="autoregressive")
            got = answers(decoder, [prompts[i] for i in order], [seeds[i] for i in order], **options, **strategy)
            for i, answer in zip(order, got):
                assert_same_bits(answer, expected[i], f"prompt {i} of {prompts}, {strategy}")
    event(f"{sum(len(answer.tokens) for answer in expected) // 25 * 25}+ tokens")
