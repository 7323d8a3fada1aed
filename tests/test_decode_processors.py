"""Logits processors, stopping criteria, penalties and min-p: seen as in a plain decode, whatever was drafted."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import layerskip_kernels as lk

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14]
NEW = 20


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def decoder(model, request):
    return lk.SelfSpeculativeDecoder.from_model(
        model, exit_layer=3, num_speculations=4, max_batch_size=2, tokenizer=tiny_tokenizer(), backend=request.param
    )


def decode(decoder, prompts=PROMPTS, **options):
    return decoder.generate(prompts, **{"max_new_tokens": NEW, "eos_token_id": [], **options})


def plain(decoder, prompts=PROMPTS, **options):
    return decode(decoder, prompts, generation_strategy="autoregressive", **options)


class Recorder:
    """A processor that depends on all it is shown, and remembers it."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        assert ids.shape[0] == 1 and scores.shape == (1, 262) and scores.dtype == torch.float32
        self.seen.append(ids[0].tolist())
        scores[0, int(ids.sum()) % 262] += 8.0  # in place, as users do
        return scores


@pytest.mark.parametrize("sampling", [{}, dict(sample=True, temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, seed=3)])
def test_a_processor_sees_a_plain_decode(decoder, sampling):
    recorder = Recorder()
    expected = plain(decoder, logits_processor=recorder, **sampling).sequences
    shown = {tuple(prompt + tokens[:i]) for prompt, tokens in zip(PROMPTS, expected) for i in range(NEW)}
    assert sorted(map(tuple, recorder.seen)) == sorted(shown)
    assert expected != plain(decoder, **sampling).sequences
    for exit_layer, drafts in ((1, 4), (3, 1), (3, 6)):
        recorder = Recorder()
        result = decode(decoder, logits_processor=recorder, exit_layer=exit_layer, num_speculations=drafts, **sampling)
        assert result.sequences == expected
        assert sorted(map(tuple, recorder.seen)) == sorted(shown)
    assert decode(decoder, PROMPTS[:1], logits_processor=[Recorder()], **sampling).sequences == expected[:1]


def test_a_processor_that_does_nothing_changes_nothing(decoder):
    for sampling in ({}, dict(sample=True, temperature=1.2, top_k=40, seed=3)):
        untouched = decode(decoder, **sampling).sequences
        assert decode(decoder, logits_processor=lambda ids, scores: scores, **sampling).sequences == untouched


@pytest.mark.parametrize(
    "options, processor",
    [
        (dict(repetition_penalty=1.7), RepetitionPenaltyLogitsProcessor(1.7)),
        (dict(min_new_tokens=9, eos_token_id=[*range(0, 262, 3)]), None),
        (
            dict(logits_processor=LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])),
            NoRepeatNGramLogitsProcessor(2),
        ),
    ],
)
def test_equals_transformers_with_its_processors(model, decoder, options, processor):
    eos = options.get("eos_token_id", [])
    for prompt, tokens in zip(PROMPTS, decode(decoder, **options).sequences):
        if processor is None:
            own = [MinNewTokensLengthLogitsProcessor(len(prompt), 9, eos)]
            assert len(tokens) > 9 or tokens[-1] not in eos
        else:
            own = [processor]
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList(own),
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def test_min_p_keeps_what_transformers_keeps(decoder):
    warper = MinPLogitsWarper(0.3)
    result = decode(decoder, sample=True, temperature=1.0, top_p=1.0, min_p=0.3, seed=1, output_logits=True)
    loose = decode(decoder, sample=True, temperature=1.0, top_p=1.0, min_p=0.0, seed=1)
    assert loose.sequences != result.sequences
    for tokens, logits in zip(result.sequences, result.logits):
        kept = warper(None, logits).isfinite()
        assert kept[range(NEW), tokens].all()


@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive", "early_exit"])
def test_a_criterion_ends_a_sequence_with_its_token(decoder, strategy):
    full = decode(decoder, generation_strategy=strategy).sequences
    seen = []

    def long_enough(ids, scores):
        assert scores is None
        seen.append(tuple(ids[0].tolist()))
        return ids.shape[1] >= 13  # a bool, not a tensor: `PROMPTS[2]` is longer from the beginning

    result = decode(decoder, generation_strategy=strategy, stopping_criteria=long_enough)
    kept = [6, 12, 1]
    assert result.sequences == [tokens[:n] for tokens, n in zip(full, kept)]
    assert result.finish_reasons == ["stopping_criteria"] * 3 and result.stats.tokens == sum(kept)
    expected = [tuple(p + t[: i + 1]) for p, t, n in zip(PROMPTS, full, kept) for i in range(n)]
    assert sorted(seen) == sorted(expected)


def test_nothing_is_called_after_the_end(decoder):
    """EOS, a stop string and the last token end the calls, too, though more drafts would have been accepted."""
    full = decode(decoder, "ab").sequences[0]
    text = decoder.tokenizer.decode(full)
    prompt = len(decoder.tokenizer("ab").input_ids)
    for options, reason in (
        (dict(eos_token_id=full[6]), "eos"),
        (dict(stop_strings=text[5:7]), "stop_string"),
        (dict(max_new_tokens=5), "length"),
    ):
        lengths = []
        result = decode(
            decoder, "ab", logits_processor=lambda ids, scores, n=lengths: n.append(ids.shape[1]) or scores, **options
        )
        tokens = result.sequences[0]
        assert result.finish_reasons == [reason] and tokens == full[: len(tokens)] and len(tokens) < NEW
        assert lengths == list(range(prompt, prompt + len(tokens)))
        assert result.stats.tokens == len(tokens)


def test_logits_are_those_before_processing(decoder):
    untouched = decode(decoder, output_logits=True, max_new_tokens=1)
    result = decode(decoder, logits_processor=Recorder(), output_logits=True, max_new_tokens=1)
    assert all(torch.equal(a, b) for a, b in zip(result.logits, untouched.logits))


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "streamer"])
def test_usable_after_an_error_in_user_code(decoder, where):
    expected = decode(decoder, PROMPTS[:1]).sequences

    class Failing:
        calls = 0

        def __call__(self, ids, scores):
            self.calls += 1
            if self.calls > 3:
                raise ZeroDivisionError("user code")
            return scores if where == "logits_processor" else False

        def put(self, ids):
            self(ids, None)

        def end(self):
            pass

    for strategy in ("self_speculative", "autoregressive"):
        with pytest.raises(ZeroDivisionError, match="user code"):
            decode(decoder, PROMPTS[:1], generation_strategy=strategy, **{where: Failing()})
        assert decode(decoder, PROMPTS[:1]).sequences == expected
        with pytest.raises(RuntimeError, match="own streamer, processor or criterion"):
            decode(decoder, stopping_criteria=StoppingCriteriaList([lambda *_: decode(decoder)]))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(repetition_penalty=0), ValueError, "repetition_penalty=0: must be above 0"),
        (dict(repetition_penalty="1"), TypeError, "repetition_penalty='1': must be a number"),
        (dict(min_new_tokens=-1), ValueError, "min_new_tokens=-1: must be at least 0"),
        (dict(sample=True, min_p=1.5), ValueError, r"min_p=1.5: must be in 0\.\.1"),
        (dict(logits_processor=3), TypeError, "logits_processor: int can't be called"),
        (dict(stopping_criteria=[None]), TypeError, "stopping_criteria: NoneType can't be called"),
        (
            dict(logits_processor=lambda i, s: s[0]),
            TypeError,
            r"logits_processor: returned \[262\], expected.*\[1, 262\]",
        ),
        (dict(logits_processor=lambda i, s: None), TypeError, "logits_processor: returned NoneType"),
    ],
)
def test_bad_arguments(decoder, options, error, message):
    with pytest.raises(error, match=message):
        decode(decoder, **options)
