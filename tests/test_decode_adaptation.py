"""Drafts that end in doubt, and a K that follows what was accepted: fewer drafts, the same bits."""

import pytest
import torch
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode.adaptation import Pace
from layerskip_kernels.decode.model import Model

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14]
ADAPTED = {
    "confidence": dict(draft_confidence=0.6),
    "pace": dict(adaptive_speculations=True),
    "both": dict(draft_confidence=0.6, adaptive_speculations=True),
}
OPTIONS = dict(max_new_tokens=48, eos_token_id=[], exit_layer=3, num_speculations=6)


def decoder(late_scale=0.1, backend="cpu", **options):
    model = tiny_model("llama3", late_scale=late_scale)
    return lk.SelfSpeculativeDecoder.from_model(model, backend=backend, max_batch_size=2, **options)


@pytest.fixture(scope="module")
def ours():
    return decoder()


@pytest.mark.parametrize("adapted", ADAPTED.values(), ids=ADAPTED)
@pytest.mark.parametrize("sampling", [{}, dict(sample=True, temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_same_bits_from_fewer_drafts(ours, sampling, adapted):
    options = OPTIONS | sampling | dict(output_logits=True)
    plain = ours.generate(PROMPTS, generation_strategy="autoregressive", **options)
    full = ours.generate(PROMPTS, **options)
    result = ours.generate(PROMPTS, **options, **adapted)
    for expected in (plain, full):
        assert result.sequences == expected.sequences
        assert all(torch.equal(a, b) for a, b in zip(result.logits, expected.logits))
    assert result.stats.drafted < full.stats.drafted / 1.5
    assert result.stats.acceptance_rate > full.stats.acceptance_rate
    alone = [ours.generate(PROMPTS[i], **(options | adapted)).stats.drafted for i in range(3 if not sampling else 0)]
    assert not alone or sum(alone) == result.stats.drafted  # a sequence's drafts do not depend on the others either


def test_the_reference_backend_adapts_too():
    reference = decoder(backend="reference")
    expected = reference.generate(PROMPTS, generation_strategy="autoregressive", **OPTIONS)
    assert reference.generate(PROMPTS, **OPTIONS, **ADAPTED["both"]).sequences == expected.sequences


@pytest.mark.parametrize("method", ["standard", "block"])
def test_rejection_in_any_batch(ours, method):
    options = OPTIONS | ADAPTED["both"] | dict(sample=True, verification="rejection", rejection_method=method)
    together = ours.generate(PROMPTS, seed=[1, 2, 3], **options).sequences
    assert [ours.generate(p, seed=[s], **options).sequences[0] for p, s in zip(PROMPTS, (1, 2, 3))] == together


def test_confidence_says_where_a_draft_ends(ours, monkeypatch):
    """Every round: as many draft steps as the surest sequence wants, and no head after a doubtful token."""
    never = ours.generate(PROMPTS[0], **OPTIONS)
    for least, same in ((0.0, True), (1.0, False)):
        result = ours.generate(PROMPTS[0], draft_confidence=least, **OPTIONS)
        assert (result.stats.drafted == never.stats.drafted) == same
    assert result.stats.drafted <= result.stats.rounds  # one draft, then doubt; none for the last token

    steps = []
    run_layers = Model.run_layers

    def counted(self, first, last, hidden, *args, **kwargs):
        steps.append((first, last, hidden.shape[1]))
        run_layers(self, first, last, hidden, *args, **kwargs)

    monkeypatch.setattr(Model, "run_layers", counted)
    stats = ours.generate(PROMPTS[0], draft_confidence=0.6, **OPTIONS).stats
    verified = [width for first, _, width in steps if first == 3]
    drafted = [width for first, last, width in steps if (first, last) == (0, 3)]
    assert len(verified) == stats.rounds
    assert sum(verified) == len(drafted) == stats.drafted + stats.rounds  # nothing computed that no draft needed


def test_pace_follows_what_is_accepted():
    pace = Pace(cost=0.2, drafts=12)
    assert pace.best() > 4  # no evidence yet
    for _ in range(60):
        pace.observe(pace.best(), 0)
    assert pace.best() == 1
    for _ in range(60):
        pace.observe(pace.best(), pace.best())
    assert pace.best() == 12


@pytest.mark.parametrize(("rate", "cost"), [(0.5, 0.1), (0.8, 0.2), (0.9, 0.05), (0.3, 0.6)])
def test_pace_is_the_fastest_by_the_papers_formula(rate, cost):
    pace = Pace(cost, drafts=16)
    pace.reached, pace.accepted = 100.0, 100.0 * rate
    speeds = {k: (1 - rate ** (k + 1)) / (1 - rate) / (1 + k * cost) for k in range(1, 17)}
    assert pace.best() == max(speeds, key=speeds.get)


def test_cost_of_a_draft_is_its_share_of_the_weights(ours):
    layers = ours.model.weights.layers
    one = sum(t.numel() for t in layers[0] if isinstance(t, torch.Tensor))
    head = ours.model.weights.lm_head.numel()
    assert ours.model.draft_share(3) == pytest.approx((3 * one + head) / (4 * one + head))


def test_a_model_that_agrees_keeps_drafting():
    agreeing = decoder(late_scale=0.0)
    stats = agreeing.generate(PROMPTS[0], adaptive_speculations=True, **(OPTIONS | dict(exit_layer=2))).stats
    assert stats.acceptance_rate == 1 and stats.drafted / stats.rounds > 4


def test_streams_and_controls(ours):
    shown = []

    class Streamer:
        def put(self, ids):
            pass

        def put_draft(self, ids):
            shown.extend(ids.tolist())

        def end(self):
            pass

    options = OPTIONS | ADAPTED["both"]
    result = ours.generate(PROMPTS[0], streamer=Streamer(), **options)
    assert len(shown) == result.stats.drafted
    controlled = OPTIONS | dict(repetition_penalty=1.3, stopping_criteria=lambda ids, scores: ids.shape[1] > 30)
    expected = ours.generate(PROMPTS, generation_strategy="autoregressive", **controlled).sequences
    assert ours.generate(PROMPTS, **controlled, **ADAPTED["both"]).sequences == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(draft_confidence=1.5), ValueError, "draft_confidence=1.5: must be in 0..1"),
        (dict(draft_confidence="high"), TypeError, "draft_confidence='high': must be a number, in 0..1"),
        (dict(adaptive_speculations=1), TypeError, "adaptive_speculations=1: must be True or False"),
    ],
)
def test_refuses(ours, options, error, message):
    with pytest.raises(error, match=message):
        ours.generate(PROMPTS[0], max_new_tokens=4, **options)
