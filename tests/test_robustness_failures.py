"""Whatever interrupts or fails in the middle of a call, the decoder's next answers are right.

A state machine mixes right calls with calls in which a streamer, a processor, a criterion, an op or the allocation of
the cache fails; and threads share decoders, and weights, while some of their calls fail.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from property_settings import few
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode import decoder as decoder_module

PROMPTS = ([5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 12, [30, 20])
NEW = 12
SAMPLED = dict(sample=True, temperature=0.9, top_k=40)
ERRORS = (OSError, RuntimeError, ValueError, MemoryError, KeyboardInterrupt, SystemExit)
OPS = ("decoder_stack", "exit_head", "verify_tokens", "kv_rollback")

batches = st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=5)
numbers = st.integers(0, len(PROMPTS) - 1)
strategies = st.one_of(
    st.just({"generation_strategy": "autoregressive"}),
    st.fixed_dictionaries(
        {"exit_layer": st.integers(1, 3), "num_speculations": st.integers(0, 5)},
        optional={"draft_confidence": st.just(0.5), "adaptive_speculations": st.booleans()},
    ),
)


@cache
def model():
    return tiny_model("llama3", dtype=torch.bfloat16, late_scale=0.05)


def new_decoder(**options):
    return lk.SelfSpeculativeDecoder.from_model(model(), exit_layer=3, num_speculations=3, **options)


def ask(decoder, numbers, sampled=False, **options):
    more = {**SAMPLED, "seed": [70 + n for n in numbers]} if sampled else {}
    return decoder.generate([PROMPTS[n] for n in numbers], max_new_tokens=NEW, eos_token_id=[], **more, **options)


@cache
def expected(number, sampled=False):
    """By a decoder of its own, which nothing has happened to."""
    return ask(new_decoder(), [number], sampled, generation_strategy="autoregressive").sequences[0]


class FailsAt:
    """Calls `original`, but raises `error` instead of call number `at`."""

    def __init__(self, at, error, original=lambda *args: None):
        self.left, self.error, self.original = at, error, original

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error("planted")
        return self.original(*args, **kwargs)


class Streamer:
    def __init__(self, put, end):
        self.put, self.end = put, end


class Failures(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 3))
    def start(self, slots):
        self.decoder = new_decoder(max_batch_size=slots)

    def fails(self, error, numbers, sampled=False, **options):
        """A call in which `error` may be raised: it comes out, or Ctrl-C ends the answers early."""
        try:
            result = ask(self.decoder, numbers, sampled, **options)
        except error as raised:
            assert str(raised) == "planted"
            return
        for number, tokens, reason in zip(numbers, result.sequences, result.finish_reasons):
            whole = expected(number, sampled)
            assert tokens == whole[: len(tokens)]
            assert reason == ("interrupted" if len(tokens) < NEW else "length")
        assert error is KeyboardInterrupt or not result.interrupted

    @rule(numbers=batches, strategy=strategies, sampled=st.booleans())
    def answers(self, numbers, strategy, sampled):
        result = ask(self.decoder, numbers, sampled, **strategy)
        assert result.sequences == [expected(number, sampled) for number in numbers]

    @rule(number=numbers, strategy=strategies, at=st.integers(1, NEW), error=st.sampled_from(ERRORS))
    def streamer_fails(self, number, strategy, at, error):
        streamer = Streamer(FailsAt(at, error), lambda: None)
        self.fails(error, [number], streamer=streamer, **strategy)

    @rule(number=numbers, error=st.sampled_from(ERRORS))
    def streamer_fails_at_its_end(self, number, error):
        self.fails(error, [number], streamer=Streamer(lambda ids: None, FailsAt(1, error)))

    @rule(
        numbers=batches,
        strategy=strategies,
        sampled=st.booleans(),
        op=st.sampled_from(OPS),
        at=st.integers(1, 40),
        error=st.sampled_from(ERRORS),
    )
    def op_fails(self, numbers, strategy, sampled, op, at, error):
        ops = self.decoder.model.ops
        with patch.object(ops, op, FailsAt(at, error, getattr(ops, op))):
            self.fails(error, numbers, sampled, **strategy)

    @rule(numbers=batches, at=st.integers(1, 30), error=st.sampled_from(ERRORS), criterion=st.booleans())
    def processor_or_criterion_fails(self, numbers, at, error, criterion):
        if criterion:
            options = {"stopping_criteria": FailsAt(at, error, lambda ids, scores: False)}
        else:
            options = {"logits_processor": FailsAt(at, error, lambda ids, scores: scores)}
        self.fails(error, numbers, **options)

    @rule(numbers=batches, error=st.sampled_from([MemoryError, KeyboardInterrupt]))
    def no_memory_for_a_larger_cache(self, numbers, error):
        prompts = [PROMPTS[n] for n in numbers]
        with patch.object(decoder_module, "KVCache", FailsAt(1, error)), pytest.raises(error):
            self.decoder.generate(prompts, max_new_tokens=5000)

    @rule(value=st.sampled_from([dict(max_new_tokens=0), dict(exit_layer=9), dict(top_p=3, sample=True)]))
    def bad_argument(self, value):
        with pytest.raises(ValueError):
            self.decoder.generate(PROMPTS[0], **value)

    @rule(number=numbers, inside=st.booleans())
    def call_from_within(self, number, inside):
        def put(ids):
            if inside:
                with pytest.raises(RuntimeError, match="own streamer"):
                    ask(self.decoder, [0])

        result = ask(self.decoder, [number], streamer=Streamer(put, lambda: None))
        assert result.sequences == [expected(number)]

    def teardown(self):
        if hasattr(self, "decoder"):
            everyone = list(range(len(PROMPTS)))
            assert ask(self.decoder, everyone).sequences == [expected(number) for number in everyone]


def test_nothing_is_left_behind_by_a_failure():
    run_state_machine_as_test(Failures, settings=few(8, stateful_step_count=12))


@pytest.mark.parametrize("threads", [2, 5])
def test_one_decoder_serves_threads_whose_calls_fail(threads):
    decoder = new_decoder(max_batch_size=2)

    def work(i):
        for turn in range(4):
            number = (i + turn) % len(PROMPTS)
            if (i + turn) % 3 == 0:
                with pytest.raises(OSError, match="planted"):
                    ask(decoder, [number], streamer=Streamer(FailsAt(1 + turn, OSError), lambda: None))
            numbers = [number, i % len(PROMPTS)]
            assert ask(decoder, numbers, bool(i % 2)).sequences == [expected(n, bool(i % 2)) for n in numbers]
        return i

    for number in range(len(PROMPTS)):
        expected(number), expected(number, True)
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(work, range(threads))) == list(range(threads))


def test_decoders_that_share_weights_work_side_by_side():
    decoders = [new_decoder(max_batch_size=size) for size in (1, 2, 3)]
    everyone = list(range(len(PROMPTS)))
    right = [expected(number) for number in everyone]
    with ThreadPoolExecutor(len(decoders)) as pool:
        for _ in range(3):
            for result in pool.map(lambda decoder: ask(decoder, everyone), decoders):
                assert result.sequences == right
    alive = decoders.pop()
    del decoders  # takes only its own cache along
    assert ask(alive, everyone).sequences == right


def test_a_decoder_within_another_ones_streamer():
    outer, inner = new_decoder(), new_decoder()
    heard = []
    streamer = Streamer(lambda ids: heard.append(ask(inner, [1]).sequences[0]), lambda: None)
    assert ask(outer, [0], streamer=streamer).sequences == [expected(0)]
    assert len(heard) > 2 and all(tokens == expected(1) for tokens in heard)
