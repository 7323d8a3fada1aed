"""The three strategies against the plain reference loop and against transformers."""

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

import layerskip_kernels as lk
from layerskip_kernels.models.loading import from_transformers
from layerskip_kernels.reference.decode import ReferenceDecoder

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14]
NEW = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05)


@pytest.fixture(scope="module")
def loaded(model):
    return from_transformers(model)


def decoder_of(model, backend="reference", **kwargs):
    return lk.SelfSpeculativeDecoder.from_model(model, backend=backend, **kwargs)


def greedy(model, prompt, new=NEW):
    ids = torch.tensor([prompt])
    output = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_greedy(family, backend_name):
    model = tiny_model(family)
    decoder = decoder_of(model, backend_name)
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    for strategy, exit_layer, drafts in (
        ("autoregressive", None, None),
        ("self_speculative", 1, 2),
        ("self_speculative", 3, 5),
    ):
        result = decoder.generate(
            PROMPTS,
            max_new_tokens=NEW,
            generation_strategy=strategy,
            exit_layer=exit_layer,
            num_speculations=drafts,
            eos_token_id=[],
        )
        assert result.sequences == expected, (strategy, exit_layer, drafts)


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("drafts", [0, 1, 4, 30])
def test_equals_reference_loop(model, loaded, exit_layer, drafts):
    decoder = decoder_of(model, exit_layer=exit_layer, num_speculations=drafts)
    result = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    for prompt, sequence in zip(PROMPTS, result.sequences):
        reference = ReferenceDecoder(loaded.config, loaded.weights, 512)
        assert sequence == reference.self_speculative(prompt, NEW, exit_layer, drafts)
        assert sequence == ReferenceDecoder(loaded.config, loaded.weights, 512).autoregressive(prompt, NEW)


def test_early_exit_equals_a_truncated_model(model):
    import copy

    truncated = copy.deepcopy(model)
    truncated.model.layers = truncated.model.layers[:2]
    truncated.config.num_hidden_layers = 2
    result = decoder_of(model).generate(
        PROMPTS, max_new_tokens=NEW, generation_strategy="early_exit", exit_layer=2, eos_token_id=[]
    )
    assert result.sequences == [greedy(truncated, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_decode_in_their_dtype(dtype):
    decoder = decoder_of(tiny_model("smollm2", dtype=dtype, late_scale=0.05))
    assert decoder.dtype == dtype
    plain = decoder.generate(PROMPTS[0], max_new_tokens=NEW, generation_strategy="autoregressive")
    assert decoder.generate(PROMPTS[0], max_new_tokens=NEW, exit_layer=3).sequences == plain.sequences


def test_long_prompt_is_prefilled_in_chunks(model):
    prompt = torch.randint(6, 262, (1, 700), generator=torch.Generator().manual_seed(1))
    decoder = decoder_of(model)
    expected = greedy(model, prompt[0].tolist(), 8)
    for deterministic in (False, True):
        result = decoder.generate(prompt, max_new_tokens=8, eos_token_id=[], deterministic_prefill=deterministic)
        assert result.sequences == [expected]


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("which", [0, 1, 2, 5, 9])
def test_eos_anywhere_ends_the_sequence_there(model, drafts, which):
    decoder = decoder_of(model, exit_layer=3, num_speculations=drafts)
    full = decoder.generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=[]).sequences[0]
    eos = full[which]
    result = decoder.generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=[eos, 4])
    assert result.sequences == [full[: full.index(eos) + 1]]
    assert result.finish_reasons == ["eos"]
    plain = decoder.generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=eos, generation_strategy="autoregressive")
    assert plain.sequences == result.sequences


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_never_more_tokens_than_asked_for(model, new):
    decoder = decoder_of(model, exit_layer=3, num_speculations=4)
    full = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[]).sequences
    result = decoder.generate(PROMPTS, max_new_tokens=new, eos_token_id=[])
    assert result.sequences == [sequence[:new] for sequence in full]
    assert result.finish_reasons == ["length"] * 3
    assert result.stats.drafted <= sum(max(new - 2, 0) for _ in PROMPTS)  # the last token needs no draft


def test_more_prompts_than_slots(model):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, 262, (n,), generator=generator).tolist() for n in (3, 40, 1, 9, 33, 5, 12)]
    alone = decoder_of(model, exit_layer=3)
    expected = [alone.generate(p, max_new_tokens=NEW).sequences[0] for p in prompts]
    for slots in (1, 2, 3, 8):
        decoder = decoder_of(model, exit_layer=3, max_batch_size=slots)
        assert decoder.generate(prompts, max_new_tokens=NEW).sequences == expected
        assert decoder.generate(prompts, max_new_tokens=NEW, generation_strategy="autoregressive").sequences == expected


def test_sampled_text_does_not_depend_on_speculation_or_batch(model):
    decoder = decoder_of(model, exit_layer=3, max_batch_size=2)
    options = dict(max_new_tokens=NEW, sample=True, temperature=0.8, top_k=50, top_p=0.95, eos_token_id=[])
    expected = decoder.generate(PROMPTS, seed=[4, 5, 6], generation_strategy="autoregressive", **options).sequences
    for drafts in (1, 4):
        for exit_layer in (1, 3):
            result = decoder.generate(
                PROMPTS, seed=[4, 5, 6], num_speculations=drafts, exit_layer=exit_layer, **options
            )
            assert result.sequences == expected
    assert decoder.generate(PROMPTS[1], seed=[5], **options).sequences == expected[1:2]
    assert decoder.generate(PROMPTS, seed=9, **options).sequences != expected
    one = decoder.generate(PROMPTS, seed=7, **options).sequences
    assert one == decoder.generate(PROMPTS, seed=7, **options).sequences
    assert one[0] == decoder.generate(PROMPTS[0], seed=7, **options).sequences[0]


def test_temperature_zero_is_greedy(model):
    decoder = decoder_of(model)
    greedy_result = decoder.generate(PROMPTS, max_new_tokens=NEW)
    assert (
        decoder.generate(PROMPTS, max_new_tokens=NEW, sample=True, temperature=0).sequences == greedy_result.sequences
    )
