"""Quantized copies of the LM head: what is said stays the same, to the bit, and rejection stays right."""

import pytest
import torch
from draft_copies import BACKENDS, NEW, PROMPTS, assert_answers_stay
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode import draft_head
from layerskip_kernels.measure import lens
from layerskip_kernels.ops import Screen, quantize


def decoder_of(model, backend, draft_head, **options):
    return lk.SelfSpeculativeDecoder.from_model(model, backend=backend, draft_head=draft_head, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", torch.bfloat16, late_scale=0.02)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_what_is_said_is_what_the_models_own_head_says(model, backend_name, sampled):
    assert_answers_stay(model, backend_name, "draft_head", sampled)


def test_drafts_are_those_of_the_copy(model):
    """Of a copy of another matrix nothing is accepted, and still the text is the model's."""
    decoder = decoder_of(model, "reference", "int8", exit_layer=3, num_speculations=4)
    expected = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    assert expected.stats.accepted > 0
    decoder.model.draft_screen = Screen(quantize(model.lm_head.weight.detach().flip(0), 8))
    result = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], profile=True)
    assert result.sequences == expected.sequences and result.stats.accepted < expected.stats.accepted / 4
    phases = result.stats.phases
    assert phases["draft head"].weight_bytes == phases["draft head"].calls * decoder.model.draft_screen.nbytes
    assert phases["verify head"].weight_bytes == phases["verify head"].calls * model.lm_head.weight.nbytes


def test_measured_agreement_is_the_copys(model):
    """`lens.read(drafting=True)` tells exactly what is accepted."""
    decoder = decoder_of(model, "reference", "int4", exit_layer=2, num_speculations=1)
    head, noise = model.lm_head.weight.detach(), torch.randn(262, 64, generator=torch.Generator().manual_seed(0))
    other = head + 2 * head.std() * noise.to(head.dtype)  # misses some of the best tokens
    decoder.model.draft_screen = Screen(quantize(other, 4))
    prompt = PROMPTS[0]
    answer = decoder.generate(prompt, max_new_tokens=NEW, eos_token_id=[], generation_strategy="autoregressive")
    (text,) = answer.sequences
    right = lens.read(decoder, prompt, text, drafting=True).drafts()[1]
    own = lens.read(decoder, prompt, text).drafts()
    assert right != own[1] and all(own[-1]), "the copy must differ somewhere for this test to see it"
    position, accepted = 1, 0
    while position < NEW - 1:
        accepted += right[position]
        position += 1 + right[position]
    stats = decoder.generate(prompt, max_new_tokens=NEW, eos_token_id=[]).stats
    assert stats.accepted == accepted


@pytest.mark.parametrize("method", ["standard", "block"])
def test_rejection_judges_drafts_by_the_distribution_they_came_from(model, monkeypatch, method):
    """What a draft was drawn from is the copy's; `test_sampling_exact.py` proves that then the text is the model's."""
    decoder = decoder_of(model, "reference", "int4", exit_layer=3, num_speculations=3)
    head, verify = decoder.ops.exit_head, decoder.ops.verify_rejection
    logits, judged = [], []

    def exit_head(hidden, norm, weight, *, logits_out, **options):
        head(hidden, norm, weight, logits_out=logits_out, **options)
        if options.get("screen") is decoder.model.draft_screen:
            logits.append(logits_out.clone())

    def verify_rejection(draft, draft_probs, *args, **options):
        judged.append((draft.clone(), draft_probs.clone()))
        return verify(draft, draft_probs, *args, **options)

    monkeypatch.setattr(decoder.ops, "exit_head", exit_head)
    monkeypatch.setattr(decoder.ops, "verify_rejection", verify_rejection)
    sampled = dict(sample=True, temperature=0.5, top_p=1.0, seed=3, verification="rejection", rejection_method=method)
    result = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], **sampled)
    assert 0 < result.stats.accepted < result.stats.drafted
    for draft, probs in (pair for pair in judged if pair[0].numel()):
        drawn_from = torch.stack([logits.pop(0) for _ in range(draft.shape[1])], 1)
        assert torch.equal(probs, (drawn_from / 0.5).softmax(-1))
        assert (probs.gather(2, draft[:, :, None]) > 0).all()
    assert judged and not logits


def test_auto_is_a_rule_of_bytes(model, monkeypatch):
    decoder = decoder_of(model, "auto", "auto")
    assert decoder.draft_head == "shared" and decoder.model.draft_screen is None
    weights, ops = decoder.model.weights, decoder.ops
    monkeypatch.setattr(draft_head.registry, "why_not", lambda *args, **options: None)
    monkeypatch.setattr(draft_head, "AUTO_BYTES", weights.lm_head.nbytes)

    def chosen(exit_layer=1, ops=ops):
        return draft_head.choose_draft_head("auto", weights, ops, exit_layer)

    assert chosen() == draft_head.AUTO
    share = weights.lm_head.nbytes / (weights.lm_head.nbytes + decoder.model.layer_bytes(0, 2))
    monkeypatch.setattr(draft_head, "AUTO_SHARE", share * 1.01)
    assert chosen(1) == draft_head.AUTO and chosen(2) == "shared"
    assert chosen(None) == "shared"  # a model of one layer
    ops = type(ops)(backends={"exit_head": "reference"})
    assert chosen(1, ops) == "shared"
    monkeypatch.setattr(draft_head, "AUTO_BYTES", weights.lm_head.nbytes + 1)
    assert chosen() == "shared"


def test_a_head_in_8_bits_may_draft_in_4(model, monkeypatch):
    monkeypatch.setattr(draft_head, "_ROWS_AT_ONCE", 100)
    decoder = decoder_of(model, "reference", "int4", quantization="int8", exit_layer=3)
    assert decoder.model.weights.lm_head.bits == 8 and decoder.model.draft_screen.weight.bits == 4
    assert decoder.model.draft_screen.weight.shape == (262, 64)
    plain = decoder.generate(PROMPTS, max_new_tokens=NEW, generation_strategy="autoregressive")
    assert decoder.generate(PROMPTS, max_new_tokens=NEW).sequences == plain.sequences
    same = decoder_of(model, "reference", "int8", quantization="int4")
    assert same.model.draft_screen is None


def test_its_size_is_said(model):
    decoder = decoder_of(model, "reference", "int8", exit_layer=1)
    assert repr(decoder).endswith("num_speculations=3, draft_head=int8 of 0.0 MiB)")
    assert "bfloat16 on cpu" in repr(decoder)
    assert decoder.model.draft_screen.nbytes == 262 * 64 + 262 * 2


@pytest.mark.parametrize("value", ["int2", None, 8, torch.zeros(2)])
def test_a_wrong_value(model, value):
    with pytest.raises(ValueError, match=r"draft_head=.*: choose auto, shared, int8 or int4"):
        decoder_of(model, "reference", value)


def test_a_backend_without_it_says_so(model, monkeypatch):
    decoder = decoder_of(model, "reference", "shared")
    monkeypatch.setattr(draft_head.registry, "why_not", lambda *args, **options: "it takes no quantized weights")
    with pytest.raises(ValueError, match=r"draft_head='int4': backend 'reference' has no use for it .it takes no quan"):
        draft_head.choose_draft_head("int4", decoder.model.weights, decoder.ops, 1)


@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.8), dict(temperature=0.8, top_k=20)], ids=str)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_a_screen_changes_no_answer(model, backend_name, sampling):
    """Nor what drafts are accepted, where drafts are screened by the same copy."""
    options = dict(max_new_tokens=NEW, eos_token_id=[], repetition_penalty=1.2)
    if sampling:
        options |= dict(sample=True, seed=[1, 2, 3], **sampling)
    own = decoder_of(model, backend_name, "shared", max_batch_size=2, head_screen="none")
    screened = decoder_of(model, backend_name, "shared", max_batch_size=2, head_screen="int8")
    assert own.model.screen is None and screened.model.screen.error is not None
    assert screened.model.draft_screen is screened.model.screen
    for strategy, exit_layer, drafts in (("autoregressive", 1, 0), ("early_exit", 1, 0), ("self_speculative", 2, 3)):
        how = dict(generation_strategy=strategy, exit_layer=exit_layer, num_speculations=drafts)
        expected, found = own.generate(PROMPTS, **options, **how), screened.generate(PROMPTS, **options, **how)
        assert found.sequences == expected.sequences
        assert found.stats.accepted == expected.stats.accepted


def test_both_copies_are_one(model):
    decoder = decoder_of(model, "reference", "int8", head_screen="int8", exit_layer=2)
    assert decoder.model.draft_screen.weight is decoder.model.screen.weight and decoder.model.draft_screen.error is None
    assert repr(decoder).endswith("draft_head=int8 of 0.0 MiB, head_screen=int8 of 0.0 MiB)")
    copy = 262 * 64 + 262 * 2
    assert decoder.model.head_bytes() == copy + 262 * 4 and decoder.model.head_bytes(drafts=True) == copy
    shares = (decoder.model.layer_bytes(0, 2) + copy) / (decoder.model.layer_bytes(0, 4) + copy + 262 * 4)
    assert decoder.model.draft_share(2) == pytest.approx(shares)


def test_its_own_auto_is_a_rule_of_bytes(model, monkeypatch):
    decoder = decoder_of(model, "auto", "auto")
    assert decoder.head_screen == "none"
    weights, ops = decoder.model.weights, decoder.ops
    monkeypatch.setattr(draft_head.registry, "why_not", lambda *args, **options: None)
    monkeypatch.setattr(draft_head, "AUTO_BYTES", weights.lm_head.nbytes)
    chosen = draft_head.choose_head_screen
    assert chosen("auto", weights, ops) == "int8"
    monkeypatch.setattr(draft_head, "AUTO_SHARE", 0.9)
    assert chosen("auto", weights, ops) == "none" and chosen("int8", weights, ops) == "int8"
    quantized = decoder_of(model, "reference", "shared", quantization="int8")
    assert quantized.head_screen == "none"
    with pytest.raises(ValueError, match="head_screen='int8': the LM head is quantized already, choose none"):
        decoder_of(model, "reference", "shared", quantization="int8", head_screen="int8")
    with pytest.raises(ValueError, match=r"head_screen='int4': choose auto, none or int8"):
        decoder_of(model, "reference", "shared", head_screen="int4")
