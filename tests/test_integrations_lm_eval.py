"""The model `layerskip` of lm-evaluation-harness, against the harness' own one for transformers."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tiny_models import tiny_checkpoint

import layerskip_kernels as lk
from layerskip_kernels.integrations.lm_eval import LayerSkipLM
from layerskip_kernels.measure import lens

LONG = "The early layers draft, the late ones verify. " * 5
PAIRS = [
    ("Q: two and two?\nA:", " four"),
    ("Q: two and two?\nA:", " five"),
    ("Q: two and two?\nA:", " f"),
    ("Q: two and two?\nA:", " " + LONG[:100]),  # longer than a window
    ("a", "b"),
    ("a", "c"),
    ("", "no context"),
    ("<|bos|>twice?", " no"),
    ("spaces   ", "move"),
    (LONG[:80], "end"),
]
PROMPTS = ["one", "two and two", LONG[:60], LONG, "one more", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama3", late_scale=0.1))


@pytest.fixture(scope="module")
def decoder(checkpoint):
    return lk.SelfSpeculativeDecoder.from_pretrained(checkpoint, exit_layer=2, num_speculations=3, max_batch_size=3)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return HFLM(pretrained=checkpoint, device="cpu", dtype="float32", batch_size=1)


def asked(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def rate(model, pairs):
    return model.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)


def generate(model, prompts=PROMPTS, **how):
    how = {"until": [], "max_gen_toks": 24, **how}
    return model.generate_until(asked("generate_until", [(prompt, dict(how)) for prompt in prompts]), disable_tqdm=True)


@pytest.mark.parametrize("max_length", [None, 48])
def test_loglikelihoods_are_those_of_transformers(decoder, theirs, max_length, monkeypatch, caplog):
    monkeypatch.setattr(theirs, "_max_length", max_length)
    pairs = [(context, text) for context, text in PAIRS if max_length is None or len(text) < max_length]
    found, expected = rate(LayerSkipLM(decoder, max_length=max_length), pairs), rate(theirs, pairs)
    for (ours, our_greedy), (logprob, greedy) in zip(found, expected, strict=True):
        assert ours == pytest.approx(logprob, abs=2e-4, rel=1e-5) and our_greedy == greedy
    assert ("exceeds model's maximum length (48)" in caplog.text) == (max_length == 48)


@pytest.mark.parametrize("max_length", [None, 20])
def test_rolling_loglikelihoods_are_those_of_transformers(decoder, theirs, max_length, monkeypatch):
    monkeypatch.setattr(theirs, "_max_length", max_length)
    requests = asked("loglikelihood_rolling", [(LONG,), ("short",), (LONG[:39],)])
    found = LayerSkipLM(decoder, max_length=max_length).loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests), abs=1e-3, rel=1e-5)


def test_what_decoding_says_is_greedy_in_its_own_numbers(decoder):
    model = LayerSkipLM(decoder)
    for prompt in ("one", LONG[:50]):
        ids = model.tok_encode(prompt)
        result = decoder.generate([ids], max_new_tokens=30, eos_token_id=[], output_logits=True)
        (said,), (logits,) = result.sequences, result.logits
        expected = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).double().sum().item()
        other = [*said[:-1], (said[-1] + 1) % decoder.config.vocab_size]
        (ours, greedy), (less, not_greedy) = model._loglikelihood_tokens([(None, ids, said), (None, ids, other)])
        assert greedy and not not_greedy and less < ours == pytest.approx(expected, rel=1e-12)


def test_other_requests_change_no_bit(decoder):
    alone = [rate(LayerSkipLM(decoder), [pair])[0] for pair in PAIRS]
    shuffled = list(enumerate(PAIRS))
    random.Random(0).shuffle(shuffled)
    together = rate(LayerSkipLM(decoder), [pair for _, pair in shuffled])
    assert [alone[i] for i, _ in shuffled] == together


def test_early_exit_rates_by_the_early_layers(decoder):
    model = LayerSkipLM(decoder, generation_strategy="early_exit")
    ids, more = model.tok_encode("Q: two?"), model.tok_encode(" two", add_special_tokens=False)
    (found,) = rate(model, [("Q: two?", " two")])
    expected = lens.read(decoder, ids, more).logprob[decoder.exit_layer - 1].sum().item()
    assert found[0] == pytest.approx(expected, rel=1e-6)
    assert found != rate(LayerSkipLM(decoder), [("Q: two?", " two")])[0]


@pytest.mark.parametrize("until", [[], ["\x7f", "e"]])
def test_answers_are_those_of_transformers(decoder, theirs, until):
    prompts = PROMPTS[:-1]
    answers = generate(LayerSkipLM(decoder), prompts, until=until)
    assert answers == [generate(theirs, [prompt], until=list(until))[0] for prompt in prompts]
    if until:
        assert not any(text in answer for text in until for answer in answers)


def test_answers_end_with_the_models_end_token(checkpoint, decoder, tmp_path):
    end = decoder.generate("one", max_new_tokens=9).sequences[0][8]
    other = str(tiny_checkpoint(tmp_path, "llama3", late_scale=0.1, eos_token_id=end))
    theirs = HFLM(pretrained=other, device="cpu", dtype="float32", batch_size=1)
    answer = generate(LayerSkipLM(other), ["one"])
    assert answer == generate(theirs, ["one"]) != generate(LayerSkipLM(decoder), ["one"])


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}])
def test_speculation_and_batch_change_no_answer(checkpoint, decoder, how):
    expected = generate(LayerSkipLM(decoder, generation_strategy="autoregressive"), **how)
    speculative = LayerSkipLM(decoder)
    assert generate(speculative, **how) == expected
    alone = LayerSkipLM(checkpoint, batch_size=1, exit_layer=1, num_speculations=5, adaptive_speculations=True)
    assert generate(alone, **how) == expected
    assert len(set(generate(speculative, ["one"] * 4, **how))) == (4 if how else 1)


def test_long_prompts_lose_their_beginning(decoder, theirs, monkeypatch, caplog):
    monkeypatch.setattr(theirs, "_max_length", 64)
    answers = generate(LayerSkipLM(decoder, max_length=64), [LONG, "short"])
    assert answers == [generate(theirs, [prompt])[0] for prompt in (LONG, "short")]
    assert "truncating to last 40 tokens" in caplog.text


def test_the_run_is_told(decoder):
    model = LayerSkipLM(decoder)
    expected = decoder.generate([[1, 2, 3], [4, 5]], max_new_tokens=20, eos_token_id=[]).stats
    model.tally.count_generated(2, expected)
    model.tally.count_generated(2, expected)
    rate(model, PAIRS[:2])
    told = model.get_model_info()["layerskip"]
    assert told["exit_layer"] == 2 and told["generation_strategy"] == "self_speculative"
    for name in ("acceptance_rate", "tokens_per_round", "position_acceptance"):
        assert told["generation"][name] == getattr(expected, name)
    assert told["generation"]["rounds"] == 2 * expected.rounds and told["generation"]["answers"] == 4
    assert told["generation"]["tokens_per_second"] == pytest.approx(expected.tokens_per_second)
    assert told["loglikelihood"]["texts"] == 2 and told["loglikelihood"]["tokens"] == 10


def test_chat_templates_as_theirs(decoder, theirs, checkpoint):
    model = LayerSkipLM(decoder)
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert model.apply_chat_template(history) == theirs.apply_chat_template(history)
    prefilled = [*history, {"role": "assistant", "content": "a"}]
    assert model.apply_chat_template(prefilled, False) == theirs.apply_chat_template(prefilled, False)
    assert model.chat_template(True) == theirs.chat_template(True)
    assert model.tokenizer_name == theirs.tokenizer_name == checkpoint.replace("/", "__")


def test_thinking_is_no_answer(checkpoint, decoder):
    (said,) = generate(LayerSkipLM(decoder), ["one"])
    (answer,) = generate(LayerSkipLM(decoder, think_end_token=said[5:7]), ["one"])
    assert said.endswith(answer) and answer == said.split(said[5:7])[-1].lstrip()
    other = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint)
    other.tokenizer.chat_template = (
        "{{ enable_thinking }}{% if messages | length > 1 %}{{ raise_exception('two') }}{% endif %}"
    )
    model = LayerSkipLM(other, enable_thinking=False)
    user = {"role": "user", "content": "u"}
    assert model.apply_chat_template([{"role": "system", "content": "s"}, user]) == "False"  # without the system's
    with pytest.raises(ValueError, match="the chat template does not take these messages: two"):
        model.apply_chat_template([user, user])


def test_the_harness_makes_it_from_its_arguments(checkpoint):
    # what the command hands on: cuda:0 where no --device is given
    made = get_model("layerskip").create_from_arg_obj(
        {"pretrained": checkpoint, "exit_layer": 1, "dtype": "bfloat16"}, {"batch_size": "4", "device": "cpu"}
    )
    assert isinstance(made, LayerSkipLM) and made.batch_size == 4 and made.decoder.exit_layer == 1
    assert made.decoder.dtype == torch.bfloat16
    if not torch.cuda.is_available():
        text = f"pretrained={checkpoint},num_speculations=2"
        made = LayerSkipLM.create_from_arg_string(text, {"device": "cuda:0", "max_batch_size": None})
        assert made.device.type == "cpu" and made.decoder.num_speculations == 2


def test_quantized_weights_are_rated_as_they_decode(checkpoint):
    model = LayerSkipLM(checkpoint, quantization="int8", draft_head="int4")
    assert model.decoder.draft_head == "int4"
    (answer,) = generate(model, ["one"])
    assert [answer] == generate(LayerSkipLM(checkpoint, quantization="int8", draft_head="shared"), ["one"])
    ids = model.tok_encode("one")
    (said,) = model.decoder.generate([ids], max_new_tokens=20, eos_token_id=[]).sequences
    ((_, greedy),) = model._loglikelihood_tokens([(None, ids, said)], disable_tqdm=True)
    assert greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generation_strategy": "magic"}, "generation_strategy='magic': choose self_speculative"),
        ({"exit_layer": 40}, "exit_layer=40: the model has 4 layers, choose 1..3"),
        ({"batch_size": "many"}, "batch_size='many': must be auto or a whole number"),
        ({"max_length": 1}, "max_length=1: must be at least 2"),
        ({"seed": "x"}, "seed='x': must be a whole number"),
    ],
)
def test_bad_arguments(checkpoint, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LayerSkipLM(checkpoint, **arguments)


def test_one_layer_has_no_early_exit(tmp_path):
    with pytest.raises(ValueError, match="generation_strategy='early_exit': a model of 1 layer has no early exit"):
        LayerSkipLM(str(tiny_checkpoint(tmp_path, "llama2", num_hidden_layers=1)), generation_strategy="early_exit")


def test_bad_requests(decoder):
    model = LayerSkipLM(decoder, max_length=64)
    with pytest.raises(
        ValueError, match=r"max_gen_toks=64: the model takes 64 tokens, prompt included, choose 1\.\.63"
    ):
        generate(model, max_gen_toks=64)
    with pytest.raises(ValueError, match="generation_kwargs num_beams=10: choose from until, max_gen_toks"):
        generate(model, num_beams=10)
    with pytest.raises(ValueError, match=r"temperature=-1\.0: must be 0 or more"):
        generate(model, do_sample=True, temperature=-1.0)
    with pytest.raises(ValueError, match="a continuation of 229 tokens: the model takes 64"):
        rate(model, [("x", LONG.strip())])
    assert generate(model, num_beams=1) == generate(model)
