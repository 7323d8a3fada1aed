"""Decoding from end to end on every backend with kernels: here, on a GPU, in Triton's interpreter, in the CUDA shim."""

import pytest
import torch
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.models.loading import from_transformers
from layerskip_kernels.reference.decode import ReferenceDecoder

OP = "exit_head"  # a backend that has it has the other ops of a decoder
PROMPTS = [[5, 9, 17, 3], [7]]
NEW = 6  # the interpreter takes half a second for a token


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05, num_hidden_layers=3)


def decoder_of(model, kernels, **kwargs):
    return lk.SelfSpeculativeDecoder.from_model(model.to(kernels.device), backend=kernels.name, **kwargs)


def test_gives_the_reference_tokens(kernels, model):
    loaded = from_transformers(model.cpu())
    expected = [ReferenceDecoder(loaded.config, loaded.weights, 64).autoregressive(prompt, NEW) for prompt in PROMPTS]
    decoder = decoder_of(model, kernels)
    plain = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], generation_strategy="autoregressive")
    assert plain.sequences == expected
    speculative = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], exit_layer=2, num_speculations=3)
    assert speculative.sequences == expected
    assert speculative.stats.accepted > 0


def test_samples_the_reference_tokens_with_and_without_speculation(kernels, model):
    options = dict(max_new_tokens=NEW, sample=True, temperature=0.8, seed=[4, 5], eos_token_id=[])
    reference = lk.SelfSpeculativeDecoder.from_model(model.cpu(), backend="reference")
    reference = reference.generate(PROMPTS, **options, generation_strategy="autoregressive")
    decoder = decoder_of(model, kernels, exit_layer=1, num_speculations=2)
    assert decoder.generate(PROMPTS, **options).sequences == reference.sequences
    plain = decoder.generate(PROMPTS, **options, generation_strategy="autoregressive")
    assert plain.sequences == reference.sequences


def test_penalizes_the_reference_tokens(kernels, model):
    options = dict(max_new_tokens=NEW, repetition_penalty=1.5, eos_token_id=[])
    reference = lk.SelfSpeculativeDecoder.from_model(model.cpu(), backend="reference")
    expected = reference.generate(PROMPTS, **options, generation_strategy="autoregressive").sequences
    decoder = decoder_of(model, kernels, exit_layer=2, num_speculations=2)
    assert decoder.generate(PROMPTS, **options).sequences == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_speculation_changes_nothing_in_half_precision(kernels, dtype):
    model = tiny_model("smollm2", dtype=dtype, late_scale=0.05, num_hidden_layers=2)
    decoder = decoder_of(model, kernels, exit_layer=1, num_speculations=3)
    plain = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], generation_strategy="autoregressive")
    result = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    assert result.sequences == plain.sequences
    alone = decoder.generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=[])
    assert alone.sequences == plain.sequences[:1]


@pytest.mark.long_interpreted
def test_many_rounds_are_the_same_with_and_without_overlapping_launches(kernels, monkeypatch):
    """On a GPU nearly all of them replay a graph."""
    model = tiny_model("llama3", dtype=torch.bfloat16, late_scale=0.05, num_hidden_layers=3)
    answers = []
    for overlap in "01":
        monkeypatch.setenv("LAYERSKIP_PDL", overlap)
        decoder = decoder_of(model, kernels, exit_layer=1, num_speculations=3)
        for strategy in ("autoregressive", "self_speculative"):
            result = decoder.generate(PROMPTS, max_new_tokens=60, eos_token_id=[], generation_strategy=strategy)
            answers.append(result.sequences)
    assert answers == answers[:1] * 4
