"""The decode loop on the native CPU backend: bit-exactness of speculation, and nothing allocated per round."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layerskip_kernels as lk
from layerskip_kernels.decode import generate

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14, [30, 20]]
NEW = 20


def decoder_of(family="llama3", dtype=torch.bfloat16, **kwargs):
    return lk.SelfSpeculativeDecoder.from_model(tiny_model(family, dtype=dtype, late_scale=0.05), **kwargs)


def logits_of(decoder, prompts, **options):
    """Tokens, and the logits each was chosen from."""
    result = decoder.generate(prompts, max_new_tokens=NEW, eos_token_id=[], output_logits=True, **options)
    return result.sequences, [logits.tolist() for logits in result.logits]


def test_cpu_tensors_decode_on_the_native_backend():
    assert set(decoder_of().ops.backends.values()) == {"cpu"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_speculation_changes_no_bit(family, dtype):
    decoder = decoder_of(family, dtype, max_batch_size=3)
    expected = [logits_of(decoder, [p], generation_strategy="autoregressive") for p in PROMPTS]
    expected = [e[0][0] for e in expected], [e[1][0] for e in expected]
    for exit_layer, drafts in ((1, 1), (2, 3), (3, 6)):
        options = dict(exit_layer=exit_layer, num_speculations=drafts)
        assert logits_of(decoder, PROMPTS, **options) == expected
        assert logits_of(decoder, PROMPTS[::-1], **options) == (expected[0][::-1], expected[1][::-1])
    for prompt, tokens, logprobs in zip(PROMPTS, *expected):
        assert logits_of(decoder, [prompt], num_speculations=5, exit_layer=3) == ([tokens], [logprobs])


def test_threads_change_no_bit():
    decoder = decoder_of()
    threads = torch.get_num_threads()
    expected = logits_of(decoder, PROMPTS, generation_strategy="autoregressive", deterministic_prefill=True)
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert logits_of(decoder, PROMPTS, exit_layer=2, deterministic_prefill=True) == expected
    finally:
        torch.set_num_threads(threads)


def test_decoders_in_several_threads_do_not_disturb_each_other():
    decoders = [decoder_of(family) for family in ("llama3", "qwen3", "smollm2")]
    options = dict(max_new_tokens=NEW, eos_token_id=[], exit_layer=2)
    expected = [d.generate(PROMPTS, **options).sequences for d in decoders]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            results = list(pool.map(lambda d: d.generate(PROMPTS, **options).sequences, decoders))
            assert results == expected


def test_sampling_changes_no_bit():
    decoder = decoder_of()
    options = dict(sample=True, temperature=0.9, top_k=40, top_p=0.95, seed=[1, 2, 3, 4])
    expected = logits_of(decoder, PROMPTS, generation_strategy="autoregressive", **options)
    assert logits_of(decoder, PROMPTS, exit_layer=3, num_speculations=4, **options) == expected
    assert decoder.generate(PROMPTS, max_new_tokens=NEW, exit_layer=3, **options).stats.accepted > 0


class Allocations(TorchDispatchMode):
    """Counts results of torch ops that are new memory."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in before:
                self.ops.append(str(func))
        return result


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", ["self_speculative", "autoregressive"])
def test_no_tensor_is_allocated_per_round(monkeypatch, strategy, sample):
    decoder = decoder_of(exit_layer=2, num_speculations=3)
    name = "self_speculative_round" if strategy == "self_speculative" else "plain_round"
    original, rounds = getattr(generate, name), []

    def counted(*args):
        with Allocations() as allocations:
            result = original(*args)
        rounds.append(allocations.ops)
        return result

    monkeypatch.setattr(generate, name, counted)
    decoder.generate(
        PROMPTS[:2], max_new_tokens=24, eos_token_id=[], generation_strategy=strategy, sample=sample, num_speculations=3
    )
    assert len(rounds) > 5 and not any(rounds[1:]), rounds  # at most 4 tokens a round
