"""`lk.generate`, called and as `custom_generate`, against transformers' own `generate`."""

import copy
import functools

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import (
    NoRepeatNGramLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import layerskip_kernels as lk
from layerskip_kernels.integrations.transformers_generate import Unsupported

TOKENIZER = tiny_tokenizer()
SPECULATION = dict(exit_layer=3, num_speculations=4)
LINE = {"input_ids": torch.tensor([[1, 9, 17, 3, 250, 11, 40]])}


def padded(*prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


BATCH = padded([5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 7)


@pytest.fixture(scope="module", params=["llama3", "mistral"])
def model(request):
    """Mistral with a sliding window in every layer, Qwen2 in some; the texts outgrow it."""
    return tiny_model(request.param, late_scale=0.1)


@pytest.fixture(scope="module")
def qwen2():
    return tiny_model("qwen2", late_scale=0.1)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama3", late_scale=0.1)


@pytest.fixture(autouse=True)
def _model_is_left_alone(request):
    name = next((n for n in ("model", "llama", "qwen2") if n in request.fixturenames), None)
    if name is None:
        yield
        return
    model = request.getfixturevalue(name)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, generation, names = model.config.to_dict(), model.generation_config.to_dict(), set(vars(model))
    config, generation = copy.deepcopy(config), copy.deepcopy(generation)
    yield
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    assert set(vars(model)) == names and not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def both(model, inputs, **options):
    """transformers' own greedy text, and ours in both ways of calling it."""
    if "generation_config" not in options:
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    hook = {k: v for k, v in options.items() if k not in ("tokenizer",)}
    ours = [lk.generate(model, **inputs, **copy.deepcopy(options), **SPECULATION)]
    if "stop_strings" not in options:
        ours.append(model.generate(**inputs, **copy.deepcopy(hook), custom_generate=lk.generate, **SPECULATION))
    return model.generate(**inputs, **options), ours


class Favour:
    """Depends on all it is shown, row by row, and on the row's number."""

    def __call__(self, ids, scores):
        scores = scores.clone()
        for row in range(len(ids)):
            scores[row, (int(ids[row].sum()) + row) % 262] += 6.0
        return scores


OPTIONS = {
    "greedy": {},
    "max_length": dict(max_new_tokens=None, max_length=33),
    "generation_config": dict(
        generation_config=GenerationConfig(max_new_tokens=11, eos_token_id=[*range(6, 262, 11)], pad_token_id=4)
    ),
    "eos list": dict(eos_token_id=[*range(6, 262, 11)]),
    "min_new_tokens": dict(eos_token_id=[*range(6, 262, 11)], min_new_tokens=9),
    "repetition_penalty": dict(repetition_penalty=1.6),
    "no_repeat_ngram": dict(no_repeat_ngram_size=2),
    "bad_words": dict(bad_words_ids=[[i] for i in range(6, 200, 2)], suppress_tokens=[7, 9]),
    "processor": dict(logits_processor=LogitsProcessorList([Favour()]), eos_token_id=[*range(6, 262, 17)]),
    "prefix function": dict(prefix_allowed_tokens_fn=lambda row, ids: [6 + (len(ids) + 7 * row) % 50, 30 + row]),
    "criterion": dict(
        stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids[:, -1] % 3 == 0]), eos_token_id=[77]
    ),
    "criterion without eos": dict(stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids[:, -1] % 3 == 0])),
    "stop string in the criteria": dict(stopping_criteria=StoppingCriteriaList([StopStringCriteria(TOKENIZER, "a")])),
    "stop string in the criteria, and eos": dict(
        stopping_criteria=StoppingCriteriaList([StopStringCriteria(TOKENIZER, ["a", "Q"])]),
        eos_token_id=[*range(6, 262, 17)],
    ),
    "criterion that reads scores": dict(
        stopping_criteria=StoppingCriteriaList([lambda ids, scores: scores[-1].softmax(-1).amax(-1) < 0.3]),
        eos_token_id=[77],
        return_dict_in_generate=True,
        output_scores=True,
    ),
    "max_time": dict(max_time=1000.0),
}


@pytest.mark.parametrize("inputs", [LINE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_equals_transformers(qwen2, inputs, options):
    _equal(qwen2, inputs, options)


@pytest.mark.parametrize("inputs", [LINE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("name", ["greedy", "eos list", "processor"])
def test_greedy_equals_transformers_on_other_models(model, inputs, name):
    _equal(model, inputs, OPTIONS[name])


def _equal(model, inputs, options):
    expected, ours = both(model, inputs, **options)
    for result in ours:
        if options.get("return_dict_in_generate"):
            result, expected = result.sequences, getattr(expected, "sequences", expected)
        assert result.dtype == torch.int64 and result.tolist() == expected.tolist()


def test_stop_strings_that_span_tokens(model):
    ascii_only = dict(suppress_tokens=[*range(6), *range(100, 262)])
    full = both(model, LINE, **ascii_only)[0][0, 7:]
    stop = [TOKENIZER.decode(full[5:8]), "never"]  # one token per byte
    expected, ours = both(model, LINE, stop_strings=stop, tokenizer=TOKENIZER, **ascii_only)
    assert ours[0].tolist() == expected.tolist() and expected.shape[1] < 27
    with pytest.raises(ValueError, match=r"stop_strings=.*: give the tokenizer"):
        lk.generate(model, **LINE, stop_strings=stop)


@pytest.mark.parametrize("options", [{}, OPTIONS["processor"], dict(repetition_penalty=1.3)])
@pytest.mark.parametrize("inputs", [LINE, BATCH], ids=["one", "batch"])
def test_dictionary_with_scores_logits_and_cache(model, inputs, options):
    wanted = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    expected, ours = both(model, inputs, **wanted, **options)
    width = expected.sequences.shape[1]
    prompt = inputs["input_ids"].shape[1]
    rows = [expected.sequences[i, prompt:].tolist() for i in range(len(expected.sequences))]
    eos = options.get("eos_token_id", [])
    ends = [next((n + 1 for n, token in enumerate(row) if token in eos), len(row)) for row in rows]
    for result in ours:
        assert type(result) is type(expected) and result.sequences.tolist() == expected.sequences.tolist()
        assert len(result.scores) == len(result.logits) == width - prompt
        for name in ("scores", "logits"):
            for step, (got, wants) in enumerate(zip(getattr(result, name), getattr(expected, name))):
                alive = [i for i, end in enumerate(ends) if step < end]
                torch.testing.assert_close(got[alive], wants[alive], rtol=1e-3, atol=1e-3)
        assert result.past_key_values.get_seq_length() == width - 1
        for got, wants in zip(result.past_key_values.layers, expected.past_key_values.layers):
            assert type(got) is type(wants) and got.keys.shape == wants.keys.shape
            for i, end in enumerate(ends):
                offset = width - 1 - wants.keys.shape[2]  # a sliding window begins there
                real = slice(
                    max(0, (prompt - inputs.get("attention_mask", torch.ones(1, prompt))[i].sum().int()) - offset),
                    max(0, prompt + end - 1 - offset),
                )
                for a, b in ((got.keys, wants.keys), (got.values, wants.values)):
                    torch.testing.assert_close(a[i, :, real], b[i, :, real], rtol=1e-3, atol=1e-3)
        assert result.stats.tokens == sum(ends) and result.stats.drafted > 0
        result.logits[0].add_(1)  # ordinary tensors, though decoding runs in inference mode
        result.past_key_values.layers[0].keys.add_(1)


@pytest.mark.parametrize("whole", [True, False], ids=["whole history", "new tokens only"])
def test_chat_turns_reuse_the_cache(model, whole):
    def chat(generate, **options):
        options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, **options)
        cache, ids, turns = DynamicCache(config=model.config), LINE["input_ids"], []
        for turn in ([], [9, 8, 7, 6, 5], [33]):
            ids = torch.cat([ids, torch.tensor([turn], dtype=torch.int64)], 1)
            held = cache.get_seq_length()
            given = ids if whole else ids[:, held:]
            mask = torch.ones_like(ids)
            output = generate(input_ids=given, attention_mask=mask, past_key_values=cache, **options)
            ids = torch.cat([ids, output[:, given.shape[1] :]], 1)
            assert cache.get_seq_length() == ids.shape[1] - 1
            turns.append(ids.tolist())
        return turns

    expected = chat(model.generate)
    assert chat(functools.partial(lk.generate, model), **SPECULATION) == expected
    assert chat(model.generate, custom_generate=lk.generate, **SPECULATION) == expected


def test_a_batch_continues_its_cache(model):
    def turns(generate, **options):
        options = dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True, **options)
        first = generate(**BATCH, max_new_tokens=8, **options)
        new = torch.tensor([[9, 8], [7, 6], [5, 4]])
        ids = torch.cat([first.sequences, new], 1)
        mask = torch.cat([BATCH["attention_mask"], torch.ones(3, 10, dtype=torch.int64)], 1)
        again = generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=8, **options
        )
        return again.sequences.tolist()

    expected = turns(model.generate)
    assert turns(functools.partial(lk.generate, model), **SPECULATION) == expected


def test_several_sequences_of_each_prompt(llama):
    options = dict(max_new_tokens=8, do_sample=True, top_k=0, num_return_sequences=3, eos_token_id=None, pad_token_id=0)
    plain = lk.generate(llama, **BATCH, **options, seed=4, generation_strategy="autoregressive")
    result = lk.generate(llama, **BATCH, **options, seed=4, **SPECULATION)
    assert result.shape == (9, 29) and torch.equal(result, plain)
    assert len({tuple(row) for row in result[:3].tolist()}) == 3
    torch.manual_seed(1)
    drawn = lk.generate(llama, **BATCH, **options)
    assert not torch.equal(drawn, lk.generate(llama, **BATCH, **options))
    torch.manual_seed(1)
    assert torch.equal(drawn, lk.generate(llama, **BATCH, **options))


def test_warpers_take_the_fused_path(llama, monkeypatch):
    """transformers puts temperature, top-k, top-p and min-p among the processors; nothing then runs on the host."""
    from layerskip_kernels.decode.controls import Controls

    options = dict(max_new_tokens=12, do_sample=True, temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, seed=3)
    decoder = lk.SelfSpeculativeDecoder.from_model(llama)
    warpers = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens")
    expected = decoder.generate(LINE["input_ids"], sample=True, **{k: options[k] for k in warpers}).sequences
    slow = lk.generate(llama, **LINE, **options, no_repeat_ngram_size=50, **SPECULATION)
    monkeypatch.setattr(Controls, "__init__", None)
    assert lk.generate(llama, **LINE, **options, **SPECULATION)[0, 7:].tolist() == expected[0]
    assert slow[0, 7:].tolist() == expected[0]  # the same noise there


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=3.0, top_k=5),
        dict(temperature=4.0, top_k=0, top_p=0.9, min_p=0.02),
        dict(temperature=3.0, top_k=0, repetition_penalty=1.5),
    ],
)
def test_sampling_has_the_distribution_of_transformers(options):
    """Three tokens of a vocabulary of eight, against the exact probabilities from transformers' model and warpers."""
    model = tiny_model("llama3", late_scale=0.5, vocab_size=8, eos_token_id=None)
    prompt, count = torch.tensor([[1, 4, 6]]), 600
    options = dict(options, do_sample=True, eos_token_id=None, pad_token_id=0)
    drawn = lk.generate(
        model,
        prompt,
        **options,
        max_new_tokens=3,
        num_return_sequences=count,
        seed=11,
        exit_layer=2,
        num_speculations=2,
    )[:, 3:]

    histories, probs = prompt, torch.ones(1)
    for _ in range(3):
        one = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, **options}
        scores = model.generate(histories, attention_mask=torch.ones_like(histories), **one).scores[0]
        probs = (probs[:, None] * scores.softmax(-1)).flatten()
        choices = torch.arange(8).repeat(len(histories))[:, None]
        histories = torch.cat([histories.repeat_interleave(8, 0), choices], 1)
    counts = torch.bincount(drawn @ torch.tensor([64, 8, 1]), minlength=512)
    assert counts[probs == 0].sum() == 0
    expected = probs * count
    often = expected >= 5  # the others are taken together
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None].clamp(min=1e-9)])
    degrees = len(expected) - 1
    assert degrees > 12
    assert ((observed - expected) ** 2 / expected).sum() < degrees + 3.5 * (2 * degrees) ** 0.5


def test_warpers_elsewhere_in_the_list_run_where_they_stand(llama):
    mine = LogitsProcessorList([TopKLogitsWarper(1), TemperatureLogitsWarper(0.5), NoRepeatNGramLogitsProcessor(50)])
    options = dict(max_new_tokens=12, eos_token_id=None)
    expected = llama.generate(**LINE, do_sample=False, **options)
    ours = lk.generate(llama, **LINE, do_sample=True, top_k=0, logits_processor=mine, **options, **SPECULATION)
    assert torch.equal(ours, expected)  # one token is left to draw from


def test_rows_in_step_are_counted_as_drafted(llama):
    """A row whose drafts were right, but not emitted because another's were not, counts them as not accepted."""
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    alone = lk.generate(llama, **BATCH, **options, **SPECULATION)
    together = lk.generate(llama, **BATCH, **options, **SPECULATION, logits_processor=[lambda ids, scores: scores])
    assert torch.equal(alone.sequences, together.sequences)
    assert together.stats.drafted > 3 * together.stats.rounds  # of 4, less at the end
    assert 0 < together.stats.acceptance_rate < alone.stats.acceptance_rate
    assert together.stats.decode_tokens == 3 * 29 == together.stats.accepted + together.stats.rounds


def test_inside_inference_mode(llama):
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, logits_processor=[Favour()], **SPECULATION)
    with torch.inference_mode():
        inside = lk.generate(llama, **LINE, **options)
    assert torch.equal(lk.generate(llama, **LINE, **options), inside)
    assert lk.generate(llama, **LINE, **options, return_dict_in_generate=True).past_key_values.get_seq_length() == 14


class Recorder:
    def __init__(self, fail_after=99):
        self.puts, self.ended, self.fail_after = [], 0, fail_after

    def put(self, ids):
        self.puts.append(ids.tolist())
        if len(self.puts) > self.fail_after:
            raise OSError("pipe")

    def end(self):
        self.ended += 1


def test_streamers_get_what_transformers_gives_them(llama):
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    theirs, ours, hooked, partial = Recorder(), Recorder(), Recorder(), Recorder()
    llama.generate(**LINE, streamer=theirs, **options)
    lk.generate(llama, **LINE, streamer=ours, **options, **SPECULATION)
    llama.generate(**LINE, custom_generate=lk.generate, streamer=hooked, **options, **SPECULATION)
    llama.generate(**LINE, custom_generate=functools.partial(lk.generate, streamer=partial), **options, **SPECULATION)
    assert ours.puts == hooked.puts == partial.puts == theirs.puts
    assert ours.ended == hooked.ended == partial.ended == 1
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True)
    result = lk.generate(llama, **LINE, streamer=streamer, **options, **SPECULATION)
    assert "".join(streamer) == TOKENIZER.decode(result[0, 7:])


def test_errors_and_interrupts_leave_everything_usable(llama):
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, **SPECULATION)
    cache = DynamicCache(config=llama.config)
    expected = lk.generate(llama, **LINE, **options)

    def failing(ids, scores):
        if ids.shape[1] > 10:
            raise ZeroDivisionError("user code")
        return scores

    with pytest.raises(ZeroDivisionError):
        lk.generate(llama, **LINE, **options, logits_processor=[failing], past_key_values=cache)
    with pytest.raises(OSError, match="pipe"):
        lk.generate(llama, **LINE, **options, streamer=Recorder(fail_after=3), past_key_values=cache)

    def interrupt(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lk.generate(llama, **LINE, **options, stopping_criteria=[interrupt])
    assert cache.get_seq_length() == 0
    assert torch.equal(lk.generate(llama, **LINE, **options, past_key_values=cache), expected)


HOLES = dict(BATCH, attention_mask=BATCH["attention_mask"].clone())
HOLES["attention_mask"][2, 4] = 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_beams=3), "num_beams=3: beam search is not supported"),
        (dict(penalty_alpha=0.5, top_k=4, trust_remote_code=True), "contrastive_search is not supported"),
        (dict(input_ids=None, inputs_embeds=torch.zeros(1, 3, 64)), "inputs_embeds: not supported"),
        (HOLES, "attention_mask: row 2 has a zero after a one; only padding on the left"),
        (dict(position_ids=torch.arange(7)[None] + 3), "position_ids: row 0 does not count from 0"),
        (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions=True: not supported"),
        (dict(BATCH, streamer=Recorder()), "streamer: works for one sequence, got 3"),
        (dict(exit_layer=9), "exit_layer=9: the model has 4 layers"),
        (dict(custom_generate=lk.generate), "custom_generate: lk.generate is one itself"),
    ],
)
def test_refused_in_one_sentence(llama, options, message):
    with pytest.raises(ValueError, match=message):
        lk.generate(llama, **{**LINE, "max_new_tokens": 3, **options})
    assert issubclass(Unsupported, ValueError)
    assert lk.generate(llama, **LINE, max_new_tokens=3, eos_token_id=None).shape == (1, 10)
