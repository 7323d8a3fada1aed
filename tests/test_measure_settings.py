"""Which exit drafts best, found from one pass over the model's own text."""

import json

import pytest
from tiny_models import tiny_checkpoint, tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode.batch import SamplingOptions
from layerskip_kernels.measure import lens
from layerskip_kernels.measure.settings import Setting, record, settings, simulate

PROMPTS = [[5, 9, 40, 7], [11], [*range(100, 140)]]
NEW = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama2", late_scale=0.2, num_hidden_layers=6)


@pytest.mark.parametrize("sample", [False, True])
def test_simulated_rounds_are_those_of_decoding(model, sample):
    """The counts that one teacher-forced pass predicts are the decoder's, for every E and K, greedy and sampled."""
    decoder = lk.SelfSpeculativeDecoder.from_model(model)
    options = dict(max_new_tokens=NEW, eos_token_id=[], sample=sample, seed=[3] * len(PROMPTS))
    texts = decoder.generate(PROMPTS, generation_strategy="autoregressive", **options).sequences
    noise = SamplingOptions(0.6, 0, 0.9, seed=3, stream=0) if sample else None
    agreed = [lens.read(decoder, prompt, text, noise).drafts() for prompt, text in zip(PROMPTS, texts)]
    assert all(all(text[-1]) for text in agreed)  # the last exit is the model
    options["seed"] = [3]
    seen = set()
    for exit_layer in range(1, 6):
        for num_speculations in (1, 2, 5):
            for prompt, text in zip(PROMPTS, agreed):
                stats = decoder.generate(
                    [prompt], exit_layer=exit_layer, num_speculations=num_speculations, **options
                ).stats
                counts = simulate(text[exit_layer - 1], num_speculations)
                assert counts[:3] == (stats.rounds, stats.drafted, stats.accepted)
                seen.add(counts)
    assert len(seen) > 5  # accepted and rejected drafts both occur


def test_simulate_by_hand():
    yes, no = True, False
    # position 0 is prefill's; with K = 2: (yes yes) no | (no yes) | (yes) no, the last token never drafted
    assert simulate([no, yes, yes, no, no, yes, no], 2) == (3, 5, 3, 4)
    assert simulate([yes], 3) == (0, 0, 0, 0)


def test_the_ceiling_is_tokens_over_bytes(model):
    ranked = settings(lk.SelfSpeculativeDecoder.from_model(model), [[[True] * 20] * 6])
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    head = model.lm_head.weight.numel()
    found = {(s.exit_layer, s.num_speculations): s for s in ranked}
    assert found[1, 2].acceptance_rate == found[1, 2].position_acceptance == 1.0
    draft = (sizes[0] + head) / (sum(sizes) + head)
    assert found[1, 2].ceiling == pytest.approx(found[1, 2].tokens_per_round / (1 + 2 * draft))
    assert ranked == sorted(ranked, key=lambda s: -s.ceiling)


def test_what_is_recorded_is_what_decoding_uses(tmp_path, model):
    tiny_checkpoint(tmp_path, "llama2", num_hidden_layers=6)
    decoder = lk.SelfSpeculativeDecoder.from_model(model)
    setting = Setting(2, 3, 0.5, 0.6, 2.0, 1.4)
    record(tmp_path, setting, lens.layer_reports(lens.read_all(decoder, [[1, 2, 3]])), texts=1)
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(tmp_path)
    assert (decoder.exit_layer, decoder.num_speculations) == (2, 3)
    report = json.loads((tmp_path / "exits.json").read_text())
    assert report["setting"]["ceiling"] == 1.4 and len(report["layers"]) == 6 and report["texts"] == 1
    assert not list(tmp_path.glob(".*"))
