"""Repetition penalties in the loop: applied by the head, to drafts too, with what transformers' processor gives."""

import pytest
import torch
from tiny_models import edit_json, tiny_checkpoint, tiny_model
from transformers import LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor

import layerskip_kernels as lk

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14, [30, 20], [8, 8, 8]]
NEW = 40
GREEDY = dict(max_new_tokens=NEW, eos_token_id=[])
SAMPLED = dict(GREEDY, sample=True, temperature=1.1, seed=5, top_p=1.0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def decoder(model, request):
    return lk.SelfSpeculativeDecoder.from_model(
        model, exit_layer=3, num_speculations=4, max_batch_size=2, backend=request.param
    )


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, dict(SAMPLED, top_k=30, top_p=0.9)], ids=["greedy", "all", "few"])
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_equals_the_processor(decoder, options, penalty):
    """Five prompts through two slots, so that rows move and slots are filled again."""
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    plain = dict(options, generation_strategy="autoregressive")
    expected = decoder.generate(PROMPTS, **plain, logits_processor=processor).sequences
    assert expected != decoder.generate(PROMPTS, **plain).sequences
    assert decoder.generate(PROMPTS, **plain, repetition_penalty=penalty).sequences == expected
    for how in (
        dict(num_speculations=1),
        dict(num_speculations=6),
        dict(exit_layer=1),
        dict(draft_confidence=0.05),
        dict(adaptive_speculations=True),
        dict(stopping_criteria=lambda ids, scores: False),
        dict(logits_processor=lambda ids, scores: scores),
    ):
        result = decoder.generate(PROMPTS, **options, **how, repetition_penalty=penalty)
        assert result.sequences == expected, how
    logits = decoder.generate(PROMPTS, **options, repetition_penalty=penalty, output_logits=True)
    assert logits.sequences == expected


def test_drafts_are_penalized_too(model):
    """With exits that equal the last layer every draft is right; only where the penalty is the drafts' own, too."""
    exact = tiny_model("llama3", late_scale=0.0)
    decoder = lk.SelfSpeculativeDecoder.from_model(exact, exit_layer=3, num_speculations=4)
    options = dict(GREEDY, repetition_penalty=1.5)
    inside = decoder.generate(PROMPTS[0], **options)
    kept = decoder.generate(PROMPTS[0], **options, output_logits=True)
    outside = decoder.generate(PROMPTS[0], **GREEDY, logits_processor=RepetitionPenaltyLogitsProcessor(1.5))
    assert inside.sequences == kept.sequences == outside.sequences
    assert inside.stats.acceptance_rate == kept.stats.acceptance_rate == 1
    assert outside.stats.acceptance_rate < 0.9


def test_rejection_at_temperature_0_gives_the_greedy_text(decoder):
    options = dict(SAMPLED, temperature=0.0, repetition_penalty=1.5)
    expected = decoder.generate(PROMPTS, **GREEDY, repetition_penalty=1.5).sequences
    assert decoder.generate(PROMPTS, **options, verification="rejection").sequences == expected


def test_raw_logits_stay_raw(decoder):
    options = dict(GREEDY, max_new_tokens=1, output_logits=True)
    penalized, plain = (decoder.generate(PROMPTS, **options, repetition_penalty=p) for p in (2.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(penalized.logits, plain.logits))


def test_the_checkpoints_own_is_the_default(tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama3")
    edit_json(folder / "generation_config.json", repetition_penalty=1.4)
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(folder, exit_layer=3)
    assert decoder.config.repetition_penalty == 1.4
    own = decoder.generate(PROMPTS, **GREEDY).sequences
    assert own == decoder.generate(PROMPTS, **GREEDY, repetition_penalty=1.4).sequences
    assert own != decoder.generate(PROMPTS, **GREEDY, repetition_penalty=1).sequences


@pytest.mark.parametrize("value", [0, -1.5, "1", True, float("inf")])
def test_a_bad_one_in_the_checkpoint(model, value):
    from layerskip_kernels.models.config import ModelConfig

    with pytest.raises(ValueError, match=r"repetition_penalty=.* in generation_config.json: must be above 0"):
        ModelConfig.from_hf(model.config, generation_config={"repetition_penalty": value})


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3)], ids=["full", "padded"])
def test_through_transformers(model, lengths):
    """Alone it is the head's; padding counts as seen, as it does in transformers."""
    ids = torch.arange(14).view(2, 7) + 20
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : 7 - length], mask[row, : 7 - length] = 9, 0
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=9)
    for more in (
        dict(repetition_penalty=1.6),
        dict(repetition_penalty=1.6, no_repeat_ngram_size=3),
        dict(logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.6, prompt_ignore_length=2)])),
    ):
        expected = model.generate(**options, **more)
        assert lk.generate(model, **options, **more, exit_layer=3).tolist() == expected.tolist()
