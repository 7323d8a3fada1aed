"""The phases of a round, timed: what is counted, and that nothing else changes."""

import pytest
import torch
from tiny_models import tiny_model

import layerskip_kernels as lk

OPTIONS = dict(max_new_tokens=20, eos_token_id=[], exit_layer=2, num_speculations=3)


@pytest.fixture(scope="module")
def decoder():
    return lk.SelfSpeculativeDecoder.from_model(tiny_model("llama3", late_scale=0.1), max_batch_size=2)


def weight_bytes(decoder, first, last):
    tensors = [t for layer in decoder.model.weights.layers[first:last] for t in layer if isinstance(t, torch.Tensor)]
    return sum(t.nbytes for t in tensors)


def test_every_phase_of_a_self_speculative_round(decoder):
    plain = decoder.generate([[5, 9, 17], [7]], **OPTIONS)
    result = decoder.generate([[5, 9, 17], [7]], profile=True, **OPTIONS)
    assert result.sequences == plain.sequences and plain.stats.phases is None
    phases, rounds = result.stats.phases, len(result.stats.round_seconds)
    assert list(phases) == ["draft layers", "draft head", "verify layers", "verify head", "accept", "roll back"]
    assert {name: phases[name].calls for name in phases if "draft" not in name} == dict.fromkeys(
        list(phases)[2:], rounds
    )
    assert phases["draft layers"].calls == phases["draft head"].calls + rounds  # the last draft's own pass has no head
    layers = decoder.config.num_layers
    assert phases["draft layers"].weight_bytes == phases["draft layers"].calls * weight_bytes(decoder, 0, 2)
    assert phases["verify layers"].weight_bytes == rounds * weight_bytes(decoder, 2, layers)
    assert phases["verify head"].weight_bytes == rounds * decoder.model.weights.lm_head.nbytes
    assert all(phase.seconds > 0 for phase in phases.values())
    assert sum(phase.seconds for phase in phases.values()) < result.stats.decode_seconds


def test_autoregressive_decoding_has_no_drafts(decoder):
    stats = decoder.generate([[5]], generation_strategy="autoregressive", profile=True, **OPTIONS).stats
    assert list(stats.phases) == ["layers", "head", "accept", "roll back"]
    assert stats.phases["layers"].calls == stats.phases["head"].calls == stats.rounds == 19


def test_a_rejected_value_names_the_argument(decoder):
    with pytest.raises((TypeError, ValueError), match="profile="):
        decoder.generate([[5]], profile="yes", **OPTIONS)
