"""The decoder as an object: arguments, statistics, streaming, interruption, reuse."""

import threading
from itertools import chain

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import TextIteratorStreamer

import layerskip_kernels as lk
from layerskip_kernels.decode.arguments import default_speculations
from layerskip_kernels.decode.batch import Request

PROMPT = "def fib(n):"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05)


@pytest.fixture
def decoder(model):
    return lk.SelfSpeculativeDecoder.from_model(
        model, exit_layer=3, num_speculations=4, tokenizer=tiny_tokenizer(), backend="reference"
    )


def plain(decoder, prompt=PROMPT, **kwargs):
    return decoder.generate(prompt, max_new_tokens=20, eos_token_id=[], **kwargs)


class Recorder:
    def __init__(self, fail_after=None, error=KeyboardInterrupt):
        self.puts, self.drafts, self.ended, self.fail_after, self.error = [], [], 0, fail_after, error

    def put(self, ids):
        self.puts.append(ids.tolist())
        if self.fail_after is not None and len(self.puts) > self.fail_after:
            raise self.error

    def put_draft(self, ids):
        self.drafts.append(ids.tolist())

    def end(self):
        self.ended += 1


def test_statistics_add_up(decoder):
    recorder = Recorder()
    result = plain(decoder, streamer=recorder)
    stats, emitted = result.stats, recorder.puts[2:]  # after the prompt and its first token
    assert stats.tokens == 20 and stats.decode_tokens == 19
    assert stats.rounds == len(emitted) == len(recorder.drafts)
    assert stats.drafted == sum(map(len, recorder.drafts))
    # a round emits its accepted drafts and one token more
    assert stats.accepted == sum(len(tokens) - 1 for tokens in emitted)
    assert all(tokens[:-1] == draft[: len(tokens) - 1] for tokens, draft in zip(emitted, recorder.drafts))
    reached = [sum(len(d) > i and len(t) - 1 >= i for t, d in zip(emitted, recorder.drafts)) for i in range(4)]
    passed = [sum(len(t) - 1 > i for t in emitted) for i in range(4)]
    assert stats.drafted_at == reached and stats.accepted_at == passed
    assert stats.acceptance_rate == stats.accepted / stats.drafted
    assert stats.position_acceptance == [p / r if r else None for p, r in zip(passed, reached)]
    assert stats.tokens_per_round == 19 / stats.rounds
    assert 0 < stats.prefill_seconds and 0 < stats.decode_seconds
    assert stats.tokens_per_second == 19 / stats.decode_seconds


def test_nothing_drafted_has_no_acceptance(decoder):
    stats = plain(decoder, generation_strategy="autoregressive").stats
    assert stats.acceptance_rate is None and stats.position_acceptance == [] and stats.tokens_per_round == 1
    assert decoder.generate(PROMPT, max_new_tokens=1).stats.tokens_per_second is None


def test_streamer_gets_prompt_then_every_token_once(decoder):
    recorder = Recorder()
    result = plain(decoder, streamer=recorder)
    assert recorder.puts[0] == decoder.tokenizer(PROMPT).input_ids
    assert list(chain.from_iterable(recorder.puts[1:])) == result.sequences[0]
    assert recorder.ended == 1


def test_transformers_streamer(decoder):
    streamer = TextIteratorStreamer(decoder.tokenizer, skip_prompt=True)
    result = plain(decoder, streamer=streamer)
    assert "".join(streamer) == decoder.tokenizer.decode(result.sequences[0])


def test_ctrl_c_returns_what_there_is(decoder):
    expected = plain(decoder).sequences[0]
    recorder = Recorder(fail_after=3)
    result = plain(decoder, streamer=recorder)
    assert result.interrupted and result.finish_reasons == ["interrupted"] and recorder.ended == 1
    assert 0 < len(result.sequences[0]) < 20
    assert result.sequences[0] == expected[: len(result.sequences[0])]
    again = plain(decoder)
    assert again.sequences[0] == expected and not again.interrupted


def test_usable_after_an_error_in_the_streamer(decoder):
    expected = plain(decoder).sequences
    with pytest.raises(OSError, match="pipe"):
        plain(decoder, streamer=Recorder(fail_after=2, error=OSError("pipe")))
    assert plain(decoder).sequences == expected


def test_generate_inside_its_own_streamer_is_refused(decoder):
    class Nested(Recorder):
        def put(self, ids):
            decoder.generate(PROMPT)

    with pytest.raises(RuntimeError, match="own streamer"):
        plain(decoder, streamer=Nested())
    assert len(plain(decoder).sequences[0]) == 20


def test_threads_take_turns(decoder):
    prompts = ["a", "bc", "def", "x = 1"]
    expected = [plain(decoder, p).sequences for p in prompts]
    results = [None] * len(prompts)

    def work(i):
        results[i] = plain(decoder, prompts[i]).sequences

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_stop_string_across_tokens(decoder):
    full = plain(decoder)
    text = decoder.tokenizer.decode(full.sequences[0])
    stop = text[6:9]  # the tokenizer has one token per byte: the string spans three
    for strategy in ("self_speculative", "autoregressive"):
        result = plain(decoder, stop_strings=["never in there", stop], generation_strategy=strategy)
        assert result.finish_reasons == ["stop_string"]
        stopped = decoder.tokenizer.decode(result.sequences[0])
        assert stopped == text[: text.index(stop) + 3]
        assert result.stats.tokens == len(result.sequences[0])


def test_prompts_of_every_kind(decoder):
    ids = decoder.tokenizer(PROMPT).input_ids
    expected = plain(decoder).sequences
    for prompt in (ids, [ids], tuple(ids), torch.tensor(ids), torch.tensor([ids]), [torch.tensor(ids)], [PROMPT]):
        assert plain(decoder, prompt).sequences == expected
    mixed = plain(decoder, [PROMPT, ids[:3]])
    assert mixed.sequences[0] == expected[0] and len(mixed.text) == 2


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(prompts=""), None, None),  # the tokenizer adds <|bos|>: one token, fine
        (dict(prompts=[]), ValueError, "prompts: an empty list"),
        (dict(prompts=[[1], []]), ValueError, r"prompts\[1\]: empty"),
        (dict(prompts=[[1, 262]]), ValueError, r"prompts\[0\]: token id 262 is outside the vocabulary, 0..261"),
        (dict(prompts=[[-1]]), ValueError, "token id -1"),
        (dict(prompts=3), TypeError, "prompts: expected text"),
        (dict(prompts=[[1.5]]), TypeError, r"prompts\[0\]"),
        (dict(prompts=torch.zeros(2, 2)), TypeError, r"prompts: a float32 tensor of shape \[2, 2\]"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens=0: must be at least 1"),
        (dict(max_new_tokens=2.0), TypeError, "max_new_tokens=2.0: must be a whole number"),
        (dict(exit_layer=4), ValueError, "exit_layer=4: the model has 4 layers, choose 1..3"),
        (dict(exit_layer=0), ValueError, "exit_layer=0: the model has 4 layers, choose 1..3"),
        (dict(num_speculations=-1), ValueError, "num_speculations=-1: must be at least 0"),
        (dict(num_speculations=64), ValueError, "num_speculations=64: choose 0..63"),
        (dict(generation_strategy="greedy"), ValueError, "choose self_speculative, autoregressive, early_exit"),
        (dict(sample=True, temperature=-1), ValueError, "temperature=-1: must be 0 or more"),
        (dict(sample=True, top_p=0), ValueError, "top_p=0: must be above 0"),
        (dict(sample=True, top_k=-2), ValueError, "top_k=-2"),
        (dict(sample=True, seed=[1, 2]), ValueError, "seed: 2 values for 1 prompts"),
        (dict(eos_token_id=999), ValueError, "eos_token_id=999: choose token ids in 0..261"),
        (dict(stop_strings=[""]), ValueError, "stop_strings"),
        (dict(prompts=[[1], [2]], streamer=Recorder()), ValueError, "streamer: works for one prompt, got 2"),
    ],
)
def test_bad_arguments_get_a_sentence_and_lose_nothing(decoder, kwargs, error, message):
    expected = plain(decoder).sequences
    kwargs = {"prompts": PROMPT, "max_new_tokens": 4, **kwargs}
    if error is None:
        decoder.generate(**kwargs)
    else:
        with pytest.raises(error, match=message):
            decoder.generate(**kwargs)
    assert plain(decoder).sequences == expected


def test_text_needs_a_tokenizer(model):
    decoder = lk.SelfSpeculativeDecoder.from_model(model, backend="reference")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        decoder.generate("text")
    with pytest.raises(ValueError, match="stop_strings: needs a tokenizer"):
        decoder.generate([1], stop_strings="a")
    assert decoder.generate([1], max_new_tokens=2).text is None


def test_max_length_is_checked_before_work_starts(model):
    decoder = lk.SelfSpeculativeDecoder.from_model(model, backend="reference", max_length=32)
    with pytest.raises(ValueError, match=r"prompts\[1\]: 30 tokens plus max_new_tokens=3 is 33.*max_length=32"):
        decoder.generate([[1], [2] * 30], max_new_tokens=3)
    assert len(decoder.generate([2] * 30, max_new_tokens=2, eos_token_id=[]).sequences[0]) == 2


def test_longer_than_the_model_was_made_for_warns(decoder, caplog):
    decoder.generate([5] * 500, max_new_tokens=20, eos_token_id=[])
    assert "520 positions asked for, the model was made for 512" in caplog.text


def test_the_cache_does_not_grow_in_both_directions_at_once(model):
    decoder = lk.SelfSpeculativeDecoder.from_model(model, backend="reference", max_batch_size=64)
    shapes = []
    for prompts, new in (([[5]] * 16, 2), ([[5]], 2000), ([[5]] * 2, 2000), ([[5]] * 3, 2000), ([[5]], 2)):
        requests = [Request(prompt, new) for prompt in prompts]
        shapes.append(decoder._reserve(requests, 4).cache.k.shape[1:4:2])
    assert shapes == [(16, 256), (1, 2048), (2, 2048), (3, 2048), (3, 2048)]


def test_cache_too_large_for_the_machine(decoder):
    with pytest.raises(MemoryError, match=r"max_batch_size=1: a KV cache of \d+ positions"):
        decoder.generate([5], max_new_tokens=2**50)
    assert len(plain(decoder).sequences[0]) == 20


def test_recorded_and_default_exit():
    model = tiny_model("llama3")
    default = lk.SelfSpeculativeDecoder.from_model(model, backend="reference")
    assert (default.exit_layer, default.num_speculations) == (1, 3)
    model.config.layerskip = {"exit_layer": 2, "num_speculations": 3}
    recorded = lk.SelfSpeculativeDecoder.from_model(model, backend="reference")
    assert (recorded.exit_layer, recorded.num_speculations) == (2, 3)
    chosen = lk.SelfSpeculativeDecoder.from_model(model, exit_layer=3, num_speculations=0, backend="reference")
    assert (chosen.exit_layer, chosen.num_speculations) == (3, 0)
    assert default_speculations(torch.device("cuda")) == 6


def test_one_layer_has_no_early_exit():
    decoder = lk.SelfSpeculativeDecoder.from_model(tiny_model("llama3", num_hidden_layers=1), backend="reference")
    with pytest.raises(ValueError, match="a model of 1 layer has no early exit"):
        decoder.generate([1])
    assert len(decoder.generate([1], max_new_tokens=3, generation_strategy="autoregressive").sequences[0]) > 0


def test_not_a_number_is_reported():
    model = tiny_model("llama3")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    decoder = lk.SelfSpeculativeDecoder.from_model(model, backend="reference")
    with pytest.raises(FloatingPointError, match="logits at position 3 are not numbers"):
        decoder.generate([1, 2, 3])


def test_backend_is_checked(model):
    with pytest.raises(ValueError, match="backend='cud': choose auto, cuda, triton, cpu, reference"):
        lk.SelfSpeculativeDecoder.from_model(model, backend="cud")
    with pytest.raises(lk.BackendUnavailable, match="cuda"):
        lk.SelfSpeculativeDecoder.from_model(model, backend="cuda")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cuda:x", "mps"])
def test_device_is_checked(device):
    with pytest.raises(ValueError, match=f"device='{device}'"):
        lk.SelfSpeculativeDecoder.from_pretrained("anything", device=device)


def test_a_round_reuses_its_buffers(decoder, monkeypatch):
    """The loop's own tensors: the same storage in every round, whatever was accepted."""
    from layerskip_kernels.decode import generate

    seen = []
    original = generate.self_speculative_round

    def spy(model, cache, r, *args):
        seen.append((cache.k.data_ptr(), r.tokens.data_ptr(), r.exit_hidden.data_ptr(), r.target.data_ptr()))
        return original(model, cache, r, *args)

    monkeypatch.setattr(generate, "self_speculative_round", spy)
    plain(decoder)
    plain(decoder)
    assert len(set(seen[: len(seen) // 2])) == 1 and len({s[0] for s in seen}) == 1


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_decides_nothing(default):
    """Kernels take float32 where they say so: logits, penalties."""
    model = tiny_model("llama3", late_scale=0.05)
    options = dict(max_new_tokens=12, eos_token_id=[], repetition_penalty=1.3, output_logits=True)
    ways = (dict(), dict(sample=True, seed=3), dict(logits_processor=lambda ids, scores: scores))
    expected = [decode(model, **options | way) for way in ways]
    torch.set_default_dtype(default)
    try:
        found = [decode(model, **options | way) for way in ways]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def decode(model, **options):
    result = lk.SelfSpeculativeDecoder.from_model(model, exit_layer=2).generate([[5, 9, 17], [7]], **options)
    return result.sequences, [logits.dtype for logits in result.logits], [logits.tolist() for logits in result.logits]
