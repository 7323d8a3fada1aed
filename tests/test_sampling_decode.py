"""Sampling through the real decode loop has the model's distribution: chi-square tests of many tokens.

The model has two layers whose attention sees two positions, so its next token depends on three tokens: what it says
after each of the V³ triples is one forward pass of transformers, and every token of a long text is one more draw.
"""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from scipy import stats
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode import rejection, round
from layerskip_kernels.ops import verify_rejection, verify_tokens

VOCAB, ROWS, NEW = 5, 128, 90
TRIPLES = list(itertools.product(range(VOCAB), repeat=3))
FILTERS = {
    "plain": dict(temperature=1.3, top_p=1.0),
    "top-k": dict(temperature=2.0, top_k=3, top_p=1.0),
    "top-p": dict(temperature=2.0, top_p=0.7),
    "min-p": dict(temperature=2.0, top_p=1.0, min_p=0.15),
    "all": dict(temperature=3.0, top_k=4, top_p=0.8, min_p=0.05),
    "penalty": dict(temperature=1.3, top_p=0.9, repetition_penalty=1.6),
}
WAYS = {
    "coupled": {},
    "standard": dict(verification="rejection"),
    "block": dict(verification="rejection", rejection_method="block"),
}
ADAPTED = dict(draft_confidence=0.5, adaptive_speculations=True)
RIGHT, WRONG = 1e-3, 1e-12  # chances of a larger chi-square: at least, at most


@cache
def model():
    return tiny_model(
        "mistral",
        seed=1,
        late_scale=0.5,
        vocab_size=VOCAB,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        sliding_window=2,
    )


@cache
def logits_after_triples():
    with torch.no_grad():
        return model()(torch.tensor(TRIPLES)).logits[:, -1].double()


@pytest.fixture(scope="module")
def plain_decoder():
    return lk.SelfSpeculativeDecoder.from_model(model(), exit_layer=1, num_speculations=3, max_batch_size=ROWS)


@pytest.fixture
def decoder():
    """One whose ops a test may break."""
    return lk.SelfSpeculativeDecoder.from_model(model(), exit_layer=1, num_speculations=3, max_batch_size=ROWS)


def expected(temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """[V³, V] probabilities after each triple, by transformers' warpers; of the penalty, once every token was seen."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    logits = logits_after_triples()
    if repetition_penalty != 1:
        everything = torch.arange(VOCAB).repeat(len(TRIPLES), 1)
        logits = RepetitionPenaltyLogitsProcessor(repetition_penalty)(everything, logits)
    return warpers(None, logits / temperature).softmax(-1)


def counts(sequences, prompt) -> torch.Tensor:
    """[V³, V] how often each token followed each triple."""
    found = torch.zeros(len(TRIPLES), VOCAB, dtype=torch.float64)
    for tokens in sequences:
        text = torch.tensor(prompt + tokens)
        triple = (text[:-3] * VOCAB + text[1:-2]) * VOCAB + text[2:-1]
        found.index_put_((triple, text[3:]), torch.ones(len(text) - 3, dtype=torch.float64), accumulate=True)
    return found


def chance(found: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square over all triples: probability of one as large, if the tokens have these probabilities."""
    if found[probs == 0].any():
        return 0.0
    statistic, freedom = 0.0, 0
    for row, p in zip(found, probs):
        wanted, order = (row.sum() * p).sort(descending=True)
        often = int((wanted >= 5).sum())
        if often < 2:
            continue
        # what is rarer than the approximation by chi-square allows joins the last cell
        cells = torch.stack([row[order], wanted])
        cells = torch.cat([cells[:, : often - 1], cells[:, often - 1 :].sum(1, keepdim=True)], dim=1)
        statistic += float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
        freedom += often - 1
    assert freedom > 30
    return float(stats.chi2.sf(statistic, freedom))


def chance_of(decoder, filters, rows=ROWS, new=NEW, **options) -> float:
    prompt = [1, 2, 3]
    seen = [0, 4] if "repetition_penalty" in filters else []
    result = decoder.generate(
        [seen + prompt] * rows, max_new_tokens=new, sample=True, seed=11, eos_token_id=[], **{**filters, **options}
    )
    assert all(len(tokens) == new for tokens in result.sequences)
    if options.get("generation_strategy") != "autoregressive":
        assert result.stats.acceptance_rate > 0.1
    return chance(counts(result.sequences, prompt), expected(**filters))


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_tokens_have_the_models_distribution(plain_decoder, way, filters):
    assert chance_of(plain_decoder, filters, **way) > RIGHT


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_refilled_slots_and_single_drafts(plain_decoder, way):
    assert chance_of(plain_decoder, FILTERS["top-p"], rows=300, new=35, num_speculations=1, **way) > RIGHT


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_drafts_whose_length_adapts(plain_decoder, way):
    assert chance_of(plain_decoder, FILTERS["min-p"], **way, **ADAPTED) > RIGHT


def test_the_check_notices_the_drafts_own_distribution(plain_decoder):
    options = dict(generation_strategy="early_exit", max_new_tokens=NEW, sample=True, seed=11, eos_token_id=[])
    result = plain_decoder.generate([[1, 2, 3]] * ROWS, **options, **FILTERS["plain"])
    assert chance(counts(result.sequences, [1, 2, 3]), expected(**FILTERS["plain"])) < WRONG


def accepts_everything(monkeypatch, decoder):
    decoder.ops.verify_rejection = lambda draft, q, p, u, n, **more: verify_rejection(
        draft, q, p, u * torch.tensor([0.0, 1.0]), n, **more
    )


def ignores_the_residual(monkeypatch, decoder):
    def verify(draft, q, p, u, n, out, **more):
        verify_rejection(draft, q, p, u, n, out=out, **more)
        rows, at = torch.arange(len(n)), out.num_accepted.long()
        out.tokens[rows, at] = rejection.draw(p[rows, at], u[rows, at, 1].double())

    decoder.ops.verify_rejection = verify


def judges_drafts_by_their_unfiltered_distribution(monkeypatch, decoder):
    original = rejection.Rejection.draw

    def draw(self, model, r, t):
        token = original(self, model, r, t)
        logits = torch.empty_like(self.draft_probs[:, t])
        model.head(r.exit_hidden[:, t], None, r.draft_head, logits)
        self.draft_probs[:, t] = (logits / r.draft_sampling.temperature[:, None]).softmax(-1)
        return token

    monkeypatch.setattr(rejection.Rejection, "draw", draw)


def uses_words_twice(monkeypatch, decoder):
    """Drafts are drawn with the numbers that decide about them."""
    original = rejection.uniforms

    def uniforms(*args):
        _, both = original(*args)
        return both[..., 0].double(), both

    monkeypatch.setattr(rejection, "uniforms", uniforms)


REJECTION_MISTAKES = [
    (accepts_everything, "standard"),
    (accepts_everything, "block"),
    (ignores_the_residual, "standard"),
    (ignores_the_residual, "block"),
    (judges_drafts_by_their_unfiltered_distribution, "standard"),
    (judges_drafts_by_their_unfiltered_distribution, "block"),
    (uses_words_twice, "standard"),
]


@pytest.mark.parametrize(("mistake", "way"), REJECTION_MISTAKES)
def test_a_broken_rejection_shows(monkeypatch, decoder, mistake, way):
    mistake(monkeypatch, decoder)
    assert chance_of(decoder, FILTERS["all"], **WAYS[way]) < WRONG


def keeps_the_drafts(monkeypatch, decoder):
    def verify(draft, target, num_draft, **more):
        target[:, :-1] = draft
        verify_tokens(draft, target, num_draft, **more)

    decoder.ops.verify_tokens = verify


def has_the_same_noise_everywhere(monkeypatch, decoder):
    original = round.begin

    def begin(model, r):
        original(model, r)
        r.next_positions.zero_()

    monkeypatch.setattr(round, "begin", begin)


def emits_drafts_it_rejected(monkeypatch, decoder):
    """The draft's token in place of the model's own at the first difference."""

    def verify(draft, target, num_draft, out, **more):
        verify_tokens(draft, target, num_draft, out=out, **more)
        rows, at = torch.arange(len(num_draft)), out.num_accepted.long()
        rejected = at < num_draft
        out.tokens[rows[rejected], at[rejected]] = draft[rows[rejected], at[rejected]]

    decoder.ops.verify_tokens = verify


@pytest.mark.parametrize("mistake", [keeps_the_drafts, has_the_same_noise_everywhere, emits_drafts_it_rejected])
def test_a_broken_coupling_shows(monkeypatch, decoder, mistake):
    mistake(monkeypatch, decoder)
    result = decoder.generate(
        [[1, 2, 3]] * ROWS, max_new_tokens=NEW, sample=True, seed=11, eos_token_id=[], **FILTERS["plain"]
    )
    assert chance(counts(result.sequences, [1, 2, 3]), expected(**FILTERS["plain"])) < WRONG


def uses_words_of_earlier_rounds(monkeypatch, decoder):
    """Random numbers by position alone: those of drafts that an earlier round dropped are drawn with again."""

    def uniforms(sampling, start, window):
        columns = [original(sampling, start + t, 1) for t in range(window)]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*columns))

    original = rejection.uniforms
    monkeypatch.setattr(rejection, "uniforms", uniforms)


@pytest.mark.parametrize(
    ("mistake", "repeated"), [(None, False), (uses_words_of_earlier_rounds, True)], ids=["right", "broken"]
)
def test_no_random_word_is_used_twice(monkeypatch, decoder, mistake, repeated):
    """What it would do to the text is too little for a chi-square test of this size."""
    used = []
    original = rejection.random_words

    def random_words(seed, stream, position, index):
        used.extend(itertools.product(zip(seed.tolist(), stream.tolist(), position.tolist()), index.tolist()))
        return original(seed, stream, position, index)

    monkeypatch.setattr(rejection, "random_words", random_words)
    if mistake:
        mistake(monkeypatch, decoder)
    options = dict(max_new_tokens=40, sample=True, seed=3, eos_token_id=[], **WAYS["block"])
    result = decoder.generate([[1, 2, 3]] * 4, **options)
    assert result.stats.drafted > result.stats.accepted
    assert (len(set(used)) < len(used)) == repeated
    assert min(index for _, index in used) >= 2**31  # Gumbel noise has the words below
