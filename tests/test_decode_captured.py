"""Rounds as CUDA graphs on a GPU, against the same rounds launch by launch: one decoder each, every call twice.

`test_decode_graphs.py` has their counterpart without one. Where nothing is captured, both decoders do the same.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_decode_graphs import OPTIONS, PROMPTS
from tiny_models import tiny_model

import layerskip_kernels as lk

OP = "exit_head"  # a backend that has it has the other ops of a decoder
pytestmark = pytest.mark.long_interpreted
DYNAMIC = dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
MODELS = {
    "smollm3": ("smollm3", {}),  # layers without RoPE, sliding windows
    "dynamic": ("llama3", dict(DYNAMIC, max_position_embeddings=64)),  # RoPE that depends on the position
    "qwen3": ("qwen3", {}),  # normed queries and keys, biases
}


@pytest.fixture
def decoders(kernels, monkeypatch):
    """(family, overrides) -> two decoders of one model, the second without graphs."""

    def make(family="llama3", **overrides):
        model = tiny_model(family, dtype=torch.bfloat16, late_scale=0.05, **overrides).to(kernels.device)
        options = dict(exit_layer=2, num_speculations=3, max_batch_size=2, backend=kernels.name)
        found = []
        for graphs in "10":
            monkeypatch.setenv("LAYERSKIP_GRAPHS", graphs)
            found.append(lk.SelfSpeculativeDecoder.from_model(model, **options))
            found[-1].generate([[1, 2, 3]], max_new_tokens=2)  # which decides
        return found

    return make


def answers(decoder, prompts=PROMPTS, **options):
    """Of two calls that are the same."""
    results = [decoder.generate(prompts, **dict(max_new_tokens=40) | options) for _ in range(2)]
    return [(r.sequences, r.finish_reasons, r.stats.accepted, r.stats.tokens) for r in results]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kind_of_round(decoders, options):
    captured, launched = decoders()
    if options.get("stop_strings"):
        options = dict(eos_token_id=list(range(0, 260, 31)))  # models here have no tokenizer
    assert answers(captured, **options) == answers(launched, **options)


@pytest.mark.parametrize("options", [{}, dict(sample=True, seed=9, top_p=0.9)], ids=["greedy", "sampled"])
def test_one_sequence(decoders, options):
    """Some of torch's copies are memory nodes of the graph then, and drafts go where the next step reads them."""
    captured, launched = decoders()
    options = dict(options, prompts=PROMPTS[:1], eos_token_id=[])
    assert answers(captured, **options) == answers(launched, **options)


@pytest.mark.parametrize("model", MODELS)
def test_models_of_other_kinds(decoders, model):
    family, overrides = MODELS[model]
    captured, launched = decoders(family, **overrides)
    assert answers(captured, eos_token_id=[]) == answers(launched, eos_token_id=[])
    sampled = dict(sample=True, temperature=0.9, top_k=30, top_p=0.9, seed=5, eos_token_id=[])
    assert answers(captured, **sampled) == answers(launched, **sampled)


def test_a_larger_cache_and_a_smaller_one_again(decoders):
    captured, launched = decoders()
    for new in (20, 400, 20):
        options = dict(max_new_tokens=new, eos_token_id=[])
        assert answers(captured, **options) == answers(launched, **options), f"{new} tokens"


def test_another_stream_than_the_default(decoders, kernels):
    captured, launched = decoders()
    expected = answers(launched, eos_token_id=[])
    stream = contextlib.nullcontext()
    if kernels.device == "cuda":
        torch.cuda.synchronize()
        stream = torch.cuda.stream(torch.cuda.Stream())
    with stream:
        assert answers(captured, eos_token_id=[]) == expected


def test_decoders_of_two_threads(decoders):
    captured, launched = decoders()
    expected = answers(launched, eos_token_id=[])
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda d: answers(d, eos_token_id=[]), (captured, launched))) == [expected] * 2
