"""Quantized copies of the early layers draft: what is said stays the same, to the bit."""

from types import SimpleNamespace

import pytest
import torch
from draft_copies import BACKENDS, NEW, PROMPTS, assert_answers_stay
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode import draft_layers
from layerskip_kernels.decode.model import Model
from layerskip_kernels.measure import lens
from layerskip_kernels.measure.costs import measure_costs
from layerskip_kernels.ops import DecoderLayers, QuantizedWeight, quantize
from layerskip_kernels.ops.decoder_stack import LINEARS


def decoder_of(model, backend, draft_layers, **options):
    return lk.SelfSpeculativeDecoder.from_model(model, backend=backend, draft_layers=draft_layers, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", torch.bfloat16, late_scale=0.02)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_what_is_said_is_what_the_models_own_layers_say(model, backend_name, sampled):
    assert_answers_stay(model, backend_name, "draft_layers", sampled)


def test_drafts_are_those_of_the_copies(model):
    """Of copies of other matrices nothing is accepted, and still the text is the model's."""
    decoder = decoder_of(model, "reference", "int8", exit_layer=3, num_speculations=4)
    expected = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    assert expected.stats.accepted > 0
    layers = decoder.model.draft_layers.first(3)
    wrong = [layer._replace(down=quantize(layer_of(model, i, "down").flip(0), 8)) for i, layer in enumerate(layers)]
    decoder = decoder_of(model, "reference", "int8", exit_layer=3, num_speculations=4)
    decoder.model.draft_layers = SimpleNamespace(first=lambda count: DecoderLayers(wrong[:count]))
    decoder.model._ranges.clear()
    result = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], profile=True)
    assert result.sequences == expected.sequences and result.stats.accepted < expected.stats.accepted / 4
    phases = result.stats.phases
    assert phases["draft layers"].weight_bytes == phases["draft layers"].calls * decoder.model.layer_bytes(0, 3, True)
    assert phases["verify layers"].weight_bytes == phases["verify layers"].calls * decoder.model.layer_bytes(0, 4)


def layer_of(model, number, name):
    return getattr(model.model.layers[number].mlp, f"{name}_proj").weight.detach()


def test_the_cache_keeps_nothing_of_the_copies(model):
    """K/V after speculation are those of plain decoding, in the early layers, too."""
    kept = []
    for name, strategy in (("shared", "autoregressive"), ("int4", "self_speculative")):
        decoder = decoder_of(model, "auto", name, exit_layer=3, num_speculations=3)
        decoder.generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=[], generation_strategy=strategy)
        kept.append(decoder._workspace.cache.read(0, len(PROMPTS[0]) + NEW - 1))
    for plain, speculated in zip(*kept):
        assert all(map(torch.equal, plain, speculated))


def test_many_sequences_draft_with_the_layers_themselves(model, monkeypatch):
    """Whose products copies would not speed up; rejection's text must not depend on how many there are."""
    decoder = decoder_of(model, "auto", "int4", exit_layer=2, num_speculations=2)
    prompts = [[5, 9, number] for number in range(draft_layers.MOST_ROWS + 1)]
    run_layers, with_copies = Model.run_layers, []

    def watched(self, first, last, hidden, cache, *, drafts=False, **where):
        with_copies.append((len(hidden), drafts))
        run_layers(self, first, last, hidden, cache, drafts=drafts, **where)

    monkeypatch.setattr(Model, "run_layers", watched)
    sampled = dict(sample=True, temperature=0.7, seed=[7] * len(prompts))
    together = decoder.generate(prompts, max_new_tokens=8, eos_token_id=[], **sampled)
    assert {drafts for rows, drafts in with_copies if rows > draft_layers.MOST_ROWS} == {False}
    with_copies.clear()
    alone = [decoder.generate(p, max_new_tokens=8, eos_token_id=[], **sampled | {"seed": 7}) for p in prompts]
    assert [a.sequences[0] for a in alone] == together.sequences
    assert (1, True) in with_copies
    sampled["verification"] = "rejection"
    together = decoder.generate(prompts, max_new_tokens=8, eos_token_id=[], **sampled)
    assert (len(prompts), True) in with_copies
    alone = [decoder.generate(p, max_new_tokens=8, eos_token_id=[], **sampled | {"seed": 7}) for p in prompts]
    assert [a.sequences[0] for a in alone] == together.sequences


@pytest.mark.parametrize("method", ["standard", "block"])
def test_rejection_works_with_copies(model, method):
    decoder = decoder_of(model, "reference", "int4", exit_layer=3, num_speculations=3)
    sampled = dict(sample=True, temperature=0.5, seed=3, verification="rejection", rejection_method=method)
    result = decoder.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], **sampled)
    assert 0 < result.stats.accepted < result.stats.drafted
    assert [len(s) for s in result.sequences] == [NEW] * 3


def test_measured_agreement_is_the_copies(model):
    """With K = 1 a draft sees the copies' K/V of its own token alone; texts are read one token at a time to match."""
    decoder = decoder_of(model, "reference", "int4", exit_layer=3, num_speculations=1, max_batch_size=1)
    layers = decoder.model.draft_layers.first(4)
    noisy = [quantize(2 * torch.randn(64, 112, generator=torch.manual_seed(i)) / 112**0.5, 4) for i in range(4)]
    decoder.model.draft_layers = SimpleNamespace(
        first=lambda count: DecoderLayers(layer._replace(down=w) for layer, w in zip(layers[:count], noisy))
    )
    decoder.model._ranges.clear()
    prompt = PROMPTS[0]
    answer = decoder.generate(prompt, max_new_tokens=NEW, eos_token_id=[], generation_strategy="autoregressive")
    (text,) = answer.sequences
    right = [lens.read(decoder, prompt + text[:n], text[n:], drafting=True).drafts()[2][0] for n in range(1, NEW)]
    own = lens.read(decoder, prompt, text).drafts()
    assert right != own[2][1:] and all(own[-1]), "the copies must differ somewhere for this test to see it"
    position, accepted = 0, 0
    while position < NEW - 2:
        accepted += right[position]
        position += 1 + right[position]
    assert decoder.generate(prompt, max_new_tokens=NEW, eos_token_id=[]).stats.accepted == accepted


def test_what_a_draft_costs(model):
    shared, copied = (
        decoder_of(model, "reference", name, exit_layer=2, max_batch_size=1) for name in ("shared", "int4")
    )
    assert copied.model.layer_bytes(0, 2, drafts=True) < 0.35 * shared.model.layer_bytes(0, 2, drafts=True)
    assert copied.model.layer_bytes(0, 4) == shared.model.layer_bytes(0, 4) == shared.model.layer_bytes(0, 4, True)
    head = shared.model.head_bytes()
    share = (copied.model.layer_bytes(0, 2, drafts=True) + head) / (shared.model.layer_bytes(0, 4) + head)
    assert copied.model.draft_share(2) == pytest.approx(share)
    for decoder in (shared, copied):
        costs = measure_costs(decoder, PROMPTS[0], 2, repeats=1)
        assert costs.copies_draft == (decoder is copied) and costs.draft_layer >= 0 < costs.round(2, 2)


def test_only_what_has_more_bits_is_copied(model):
    decoder = decoder_of(model, "reference", "int4", quantization="int8", exit_layer=2)
    (first, _), own = decoder.model.draft_layers.first(2), decoder.model.weights.layers[0]
    assert all(getattr(first, name).bits == 4 and getattr(own, name).bits == 8 for name in LINEARS)
    assert first.attn_norm is own.attn_norm
    plain = decoder.generate(PROMPTS, max_new_tokens=NEW, generation_strategy="autoregressive")
    assert decoder.generate(PROMPTS, max_new_tokens=NEW).sequences == plain.sequences
    for same in ("int8", "int4"):
        assert decoder_of(model, "reference", "int8", quantization=same).model.draft_layers is None


def test_copies_are_made_as_exits_need_them(model):
    decoder = decoder_of(model, "reference", "int8", exit_layer=1)
    assert len(decoder.model.draft_layers._made) == 1
    decoder.generate(PROMPTS[0], max_new_tokens=4, exit_layer=3)
    assert len(decoder.model.draft_layers._made) == 3
    made = decoder.model.draft_layers.first(2)
    assert isinstance(made[1].q, QuantizedWeight) and made[1].q is decoder.model.draft_layers.first(3)[1].q


def test_auto_is_a_rule_of_bytes(model, monkeypatch):
    decoder = decoder_of(model, "auto", "auto")
    assert decoder.draft_layers == "shared" and decoder.model.draft_layers is None
    weights, ops = decoder.model.weights, decoder.ops
    monkeypatch.setattr(draft_layers.registry, "why_not", lambda *args, **options: None)
    monkeypatch.setattr(draft_layers, "AUTO_BYTES", decoder.model.layer_bytes(0, 2))

    def chosen(exit_layer, backend_name="cpu", weights=weights):
        ops = SimpleNamespace(backends={"small_linear": backend_name})
        return draft_layers.choose_draft_layers("auto", weights, ops, exit_layer)

    assert [chosen(e) for e in (None, 1, 2, 3)] == ["shared", "shared", draft_layers.AUTO, draft_layers.AUTO]
    assert chosen(3, "reference") == "shared"
    quantized = decoder_of(model, "reference", "shared", quantization="int8").model.weights
    monkeypatch.setattr(draft_layers, "AUTO_BYTES", 1)
    assert chosen(3, weights=quantized) == "shared"
    assert draft_layers.choose_draft_layers("int4", quantized, ops, 3) == "int4"


def test_its_size_is_said(model):
    decoder = decoder_of(model, "reference", "int8", exit_layer=1)
    assert repr(decoder).endswith("num_speculations=3, draft_layers=int8 of 0.0 MiB, draft_head=shared)")
    assert "draft_layers" not in repr(decoder_of(model, "reference", "shared"))


def test_weights_that_have_no_copy():
    odd = tiny_model("llama3", torch.bfloat16, intermediate_size=111)
    with pytest.raises(ValueError, match=r"down of layer 0 cannot be copied in 4 bits: .*111 columns"):
        decoder_of(odd, "reference", "int4")
    decoder_of(odd, "reference", "int8")
    q = odd.model.layers[1].self_attn.q_proj.weight.detach()
    q[3, 3] = float("nan")
    decoder = decoder_of(odd, "reference", "int8", exit_layer=1)
    with pytest.raises(ValueError, match=r"q of layer 1 cannot be copied in 8 bits: .*row 3"):
        decoder.generate(PROMPTS[0], exit_layer=2, max_new_tokens=4)
    q[3, 3] = 0.0
    assert len(decoder.generate(PROMPTS[0], max_new_tokens=4).sequences[0]) <= 4


@pytest.mark.parametrize("value", ["int2", None, 8, torch.zeros(2)])
def test_a_wrong_value(model, value):
    with pytest.raises(ValueError, match=r"draft_layers=.*: choose auto, shared, int8 or int4"):
        decoder_of(model, "reference", value)


def test_a_backend_without_it_says_so(model, monkeypatch):
    decoder = decoder_of(model, "reference", "shared")
    monkeypatch.setattr(draft_layers.registry, "why_not", lambda *args, **options: "it takes no quantized weights")
    with pytest.raises(ValueError, match=r"draft_layers='int4': backend 'reference' has no use for it .it takes no"):
        draft_layers.choose_draft_layers("int4", decoder.model.weights, decoder.ops, 1)
