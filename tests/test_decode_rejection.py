"""`verification="rejection"` as an option of `generate`: what it leaves as it is, and what it refuses."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

import layerskip_kernels as lk

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14]
METHODS = ("standard", "block")
SAMPLED = dict(sample=True, temperature=1.5, top_p=0.95, seed=[4, 5, 6], verification="rejection")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def decoder(model, request):
    return lk.SelfSpeculativeDecoder.from_model(
        model, exit_layer=3, num_speculations=4, max_batch_size=2, tokenizer=tiny_tokenizer(), backend=request.param
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_has_one_text_in_any_batch(decoder, method):
    options = SAMPLED | dict(max_new_tokens=24, eos_token_id=[], rejection_method=method)
    together = decoder.generate(PROMPTS, **options)
    assert together.stats.accepted < together.stats.drafted
    for prompt, seed, tokens in zip(PROMPTS, options.pop("seed"), together.sequences):
        assert decoder.generate(prompt, seed=[seed], **options).sequences == [tokens]
    assert decoder.generate(PROMPTS, seed=[1, 2, 3], **options).sequences != together.sequences


@pytest.mark.parametrize("method", METHODS)
def test_temperature_zero_is_greedy(decoder, method):
    greedy = decoder.generate(PROMPTS, max_new_tokens=24)
    options = SAMPLED | dict(temperature=0, rejection_method=method)
    result = decoder.generate(PROMPTS, max_new_tokens=24, **options)
    assert result.sequences == greedy.sequences
    assert result.stats.accepted == greedy.stats.accepted


def test_without_drafts_and_for_one_token(decoder):
    for options in (dict(num_speculations=0, max_new_tokens=9), dict(max_new_tokens=1), dict(max_new_tokens=2)):
        result = decoder.generate(PROMPTS, eos_token_id=[], **SAMPLED, **options)
        assert [len(tokens) for tokens in result.sequences] == [options["max_new_tokens"]] * 3
        assert result.stats.drafted == 0


@pytest.mark.parametrize("method", METHODS)
def test_ends_where_it_should(decoder, method):
    options = SAMPLED | dict(seed=[4], max_new_tokens=24, rejection_method=method)
    full = decoder.generate(PROMPTS[0], eos_token_id=[], **options).sequences[0]
    eos = full[9]
    ended = decoder.generate(PROMPTS[0], eos_token_id=eos, **options)
    assert ended.sequences == [full[: full.index(eos) + 1]] and ended.finish_reasons == ["eos"]
    stop = decoder.tokenizer.decode(full)[4:6]
    stopped = decoder.generate(PROMPTS[0], eos_token_id=[], stop_strings=stop, **options)
    assert stopped.finish_reasons == ["stop_string"] and stopped.sequences[0] == full[: len(stopped.sequences[0])]


def test_streams_and_keeps_logits(model, decoder):
    seen, drafts = [], []

    class Streamer:
        def put(self, ids):
            seen.extend(ids.tolist())

        def put_draft(self, ids):
            drafts.extend(ids.tolist())

        def end(self):
            pass

    options = SAMPLED | dict(seed=[4], max_new_tokens=16, eos_token_id=[], output_logits=True)
    result = decoder.generate(PROMPTS[0], streamer=Streamer(), **options)
    tokens, logits = result.sequences[0], result.logits[0]
    assert seen == PROMPTS[0] + tokens and len(drafts) == result.stats.drafted
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0] + tokens[:-1]])).logits[0, len(PROMPTS[0]) - 1 :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(verification="block"), "verification='block': choose coupled or rejection"),
        (dict(verification=None), "verification=None: choose coupled or rejection"),
        (dict(rejection_method="greedy"), "rejection_method='greedy': choose standard or block"),
        (dict(verification="coupled", rejection_method="block"), "rejection_method='block': is of verification="),
        (dict(sample=False), "verification='rejection': decides about sampled drafts, so it needs sample=True"),
        (dict(generation_strategy="autoregressive"), "it needs sample=True and generation_strategy='self_spec"),
        (dict(generation_strategy=torch.zeros(3)), "it needs sample=True and generation_strategy='self_speculative'"),
        (dict(generation_strategy="early_exit"), "it needs sample=True and generation_strategy='self_spec"),
        (dict(repetition_penalty=1.2, output_logits=True), "without output_logits where there is a repetition_penalty"),
        (dict(min_new_tokens=3, eos_token_id=2), "verification='rejection': works without logits_processor"),
        (dict(stopping_criteria=lambda ids, scores: False), "verification='rejection': works without logits_proc"),
    ],
)
def test_refuses(decoder, options, message):
    before = decoder.generate(PROMPTS[0], max_new_tokens=4).sequences
    with pytest.raises(ValueError) as error:
        decoder.generate(PROMPTS[0], max_new_tokens=4, **{**SAMPLED, "seed": 1, **options})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert decoder.generate(PROMPTS[0], max_new_tokens=4).sequences == before
