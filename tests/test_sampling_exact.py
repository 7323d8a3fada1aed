"""Rejection sampling, computed instead of sampled: probabilities of whole sequences over all rounds of a generation.

`verify_rejection` is a step function of its uniform numbers, and these are multiples of 2⁻²⁴. Bisection over them finds
every step of the op, as a black box; the measure of what lies between is then a probability without sampling error.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch

from layerskip_kernels.decode.rejection import draw
from layerskip_kernels.ops import Verified, verify_rejection

OP = "verify_rejection"
METHODS = ("standard", "block")
STEPS = 1 << 24  # values that a uniform number can take
VOCAB, LENGTH = 3, 4  # tokens to choose from, tokens of a sequence
EXACT, WRONG = 1e-6, 1e-2  # total variation: what float32 probabilities leave, what a broken rule must show


class Tables:
    """A draft's and a target's next-token probabilities after every sequence of up to LENGTH - 1 tokens, some zero."""

    def __init__(self, seed: int, close: bool):
        generator = torch.Generator().manual_seed(seed)
        self.q, self.p = {}, {}
        for length in range(LENGTH):
            for prefix in itertools.product(range(VOCAB), repeat=length):
                target, noise = torch.rand(2, VOCAB, generator=generator) + 0.02
                target[torch.rand(VOCAB, generator=generator) < 0.15] = 0
                target[length % VOCAB] += 0.05
                draft = target + 0.3 * noise if close else noise
                draft[torch.rand(VOCAB, generator=generator) < 0.1] = 0
                draft[prefix[-1] if prefix else 0] += 0.05
                self.p[prefix], self.q[prefix] = target / target.sum(), draft / draft.sum()

    def target(self) -> dict[tuple[int, ...], float]:
        """Probabilities of all sequences of LENGTH tokens."""
        joint = {(): 1.0}
        for _ in range(LENGTH):
            joint = {
                (*prefix, token): mass * p
                for prefix, mass in joint.items()
                for token, p in enumerate(normal(self.p[prefix]))
            }
        return joint


def normal(weights: torch.Tensor) -> list[float]:
    weights = weights.double()
    return (weights / weights.sum()).tolist()


def drafts_after(tables: Tables, prefix: tuple[int, ...], drafts: int, confidence: float):
    """All that may be drafted after a prefix; a draft ends early where the draft's best token is less probable."""

    def extend(draft: tuple[int, ...]):
        doubtful = draft and float(tables.q[prefix + draft[:-1]].max()) < confidence
        if doubtful or len(draft) == min(drafts, LENGTH - 1 - len(prefix)):
            yield draft
        else:
            for token in range(VOCAB):
                yield from extend((*draft, token))

    return extend(())


class Case:
    """Every draft after every prefix, one row each, as the decode loop would ask the op about it."""

    def __init__(self, tables: Tables, drafts: int, device: str, confidence: float = 0.0):
        keys = [(prefix, draft) for prefix in tables.p for draft in drafts_after(tables, prefix, drafts, confidence)]
        rows = len(keys)
        self.keys, self.drafts, self.device = keys, drafts, device
        self.draft = torch.zeros(rows, drafts, dtype=torch.int64)
        self.num_draft = torch.zeros(rows, dtype=torch.int32)
        self.q = torch.full((rows, drafts, VOCAB), float("nan"))  # what is not drafted must not matter
        self.p = torch.full((rows, drafts + 1, VOCAB), float("nan"))
        for row, (prefix, draft) in enumerate(keys):
            self.num_draft[row] = len(draft)
            for t in range(len(draft) + 1):
                self.p[row, t] = tables.p[prefix + draft[:t]]
            for t, token in enumerate(draft):
                self.draft[row, t] = token
                self.q[row, t] = tables.q[prefix + draft[:t]]

    def ask(self, verify, method: str, rows: torch.Tensor, accept: torch.Tensor, choose: torch.Tensor):
        """(accepted, next token) of these rows; accept [n, K] and choose [n] count steps of the uniform numbers."""
        uniforms = torch.empty(len(rows), self.drafts + 1, 2)
        uniforms[:, :-1, 0], uniforms[:, -1, 0] = accept / STEPS, 0.5
        uniforms[:, :, 1] = (choose / STEPS)[:, None]
        arguments = (self.draft[rows], self.q[rows], self.p[rows], uniforms, self.num_draft[rows])
        result = verify(
            *(a.to(self.device) for a in arguments),
            method=method,
            eos_ids=torch.zeros(0, dtype=torch.int64, device=self.device),
            remaining=torch.full((len(rows),), LENGTH, dtype=torch.int32, device=self.device),
            finished=torch.zeros(len(rows), dtype=torch.bool, device=self.device),
        )
        accepted = result.num_accepted.cpu().long()
        assert torch.equal(result.num_emitted.cpu().long(), accepted + 1)
        tokens = result.tokens.cpu()
        drafted = torch.arange(self.drafts + 1) < accepted[:, None]
        assert torch.equal(tokens[:, :-1][drafted[:, :-1]], self.draft[rows][drafted[:, :-1]])
        return accepted, tokens.gather(1, accepted[:, None])[:, 0]


def bisect(holds, count: int) -> torch.Tensor:
    """For each of `count` cases the number of steps n in 0..STEPS for which `holds` does; it holds below some point."""
    low, high = torch.zeros(count, dtype=torch.int64), torch.full((count,), STEPS)
    while bool((low < high).any()):
        middle = (low + high) // 2
        below = holds(middle.clamp(max=STEPS - 1)) & (low < high)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, torch.maximum(low, middle))
    return low


def acceptance_steps(case: Case, verify, method: str) -> torch.Tensor:
    """[rows, K]: below how many steps each uniform number accepts, whatever the others are; STEPS: always."""
    rows, found = torch.arange(len(case.keys)), torch.full((len(case.keys), case.drafts), STEPS)
    half = torch.full((len(rows),), STEPS // 2)
    for i in range(case.drafts):
        for others in itertools.product((0, STEPS - 1), repeat=case.drafts - 1):
            corner = torch.tensor([*others[:i], 0, *others[i:]]).repeat(len(rows), 1)

            def ask(steps, corner=corner, i=i):
                corner[:, i] = steps
                return case.ask(verify, method, rows, corner, half)[0]

            at_zero = ask(torch.zeros_like(half))
            visible = ask(half * 2 - 1) != at_zero
            steps = bisect(lambda middle, ask=ask, at_zero=at_zero: ask(middle) == at_zero, len(rows))
            known = visible & (found[:, i] != STEPS)
            assert torch.equal(found[known, i], steps[known]), "the step depends on the other uniform numbers"
            found[:, i] = torch.where(visible, steps, found[:, i])
    return found


def round_law(case: Case, verify, method: str) -> dict[tuple, dict[tuple[int, ...], float]]:
    """For each (prefix, draft) the probabilities of what the round emits."""
    steps = acceptance_steps(case, verify, method)
    rows = torch.arange(len(case.keys))
    law: dict[tuple, dict] = {key: defaultdict(float) for key in case.keys}
    for cell in itertools.product((True, False), repeat=case.drafts):
        below = torch.tensor(cell)
        mass = torch.where(below, steps, STEPS - steps).double().div(STEPS).prod(-1)
        inside = torch.where(below, (steps - 1).clamp(min=0), steps.clamp(max=STEPS - 1))
        outside = torch.where(below, 0, STEPS - 1).expand_as(inside)
        present = mass > 0
        accepted, _ = case.ask(verify, method, rows, inside, torch.zeros_like(rows))
        again, _ = case.ask(verify, method, rows, outside, torch.zeros_like(rows))
        assert torch.equal(accepted[present], again[present]), "not constant between its steps"
        reached = torch.zeros(len(rows), dtype=torch.int64)
        for token in range(VOCAB):
            last = token == VOCAB - 1
            upto = (
                torch.full_like(reached, STEPS)
                if last
                else bisect(
                    lambda n, inside=inside, token=token: case.ask(verify, method, rows, inside, n)[1] <= token,
                    len(rows),
                )
            )
            for row, key in enumerate(case.keys):
                if present[row]:
                    emitted = (*key[1][: accepted[row]], token)
                    law[key][emitted] += float(mass[row]) * float(upto[row] - reached[row]) / STEPS
            reached = upto
    return law


def generated(
    tables: Tables, drafts: int, verify, method: str, device: str, confidence: float
) -> dict[tuple[int, ...], float]:
    """Probabilities of all sequences of LENGTH tokens, made by rounds of up to `drafts` drafts."""
    case = Case(tables, drafts, device, confidence)
    law = round_law(case, verify, method)
    by_length: list[dict[tuple[int, ...], float]] = [defaultdict(float) for _ in range(LENGTH + 1)]
    by_length[0][()] = 1.0
    for length in range(LENGTH):
        for prefix, mass in by_length[length].items():
            for draft in drafts_after(tables, prefix, drafts, confidence):
                drawn = mass
                for t, token in enumerate(draft):
                    drawn *= normal(tables.q[prefix + draft[:t]])[token]
                for emitted, share in law[prefix, draft].items():
                    by_length[length + len(emitted)][prefix + emitted] += drawn * share
    return by_length[LENGTH]


def distance(tables: Tables, drafts: int, verify, method: str, device: str = "cpu", confidence: float = 0.0) -> float:
    """Total variation between what is generated and the target."""
    found, expected = generated(tables, drafts, verify, method, device, confidence), tables.target()
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    return sum(abs(found.get(sequence, 0.0) - mass) for sequence, mass in expected.items()) / 2


@pytest.mark.long_interpreted
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_sequences_have_the_targets_probabilities(kernels, method, drafts, close):
    assert distance(Tables(drafts, close), drafts, verify_rejection, method, kernels.device) < EXACT


@pytest.mark.parametrize("method", METHODS)
def test_drafts_that_end_in_doubt_change_no_probability(method):
    tables = Tables(3, False)
    lengths = {len(draft) for draft in drafts_after(tables, (), 3, 0.5)}
    assert len(lengths) > 1
    assert distance(tables, 3, verify_rejection, method, confidence=0.5) < EXACT


def with_next_token(result: Verified, weights: torch.Tensor, uniforms: torch.Tensor) -> Verified:
    """The same acceptance, but the next token drawn from `weights` [B, K+1, V]."""
    at = result.num_accepted.long()
    rows = torch.arange(len(at))
    result.tokens[rows, at] = draw(weights[rows, at], uniforms[rows, at, 1].double())
    return result


def accepts_everything(draft, q, p, u, n, **more):
    return verify_rejection(draft, q, p, u * torch.tensor([0.0, 1.0]), n, **more)


def accepts_nothing(draft, q, p, u, n, **more):
    return verify_rejection(draft, q, p, u, torch.zeros_like(n), **more)


def accepts_too_often(draft, q, p, u, n, **more):
    return verify_rejection(draft, q, p, u * torch.tensor([0.9, 1.0]), n, **more)


def ignores_the_residual(draft, q, p, u, n, **more):
    return with_next_token(verify_rejection(draft, q, p, u, n, **more), p, u)


def takes_the_other_methods_residual(draft, q, p, u, n, **more):
    residual = torch.cat([(p[:, :-1] - q).clamp(min=0), p[:, -1:]], dim=1)
    residual = torch.where(torch.arange(p.shape[1])[None, :, None] < n[:, None, None], residual, p)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    return with_next_token(verify_rejection(draft, q, p, u, n, **more), residual, u)


def believes_the_draft_was_uniform(draft, q, p, u, n, **more):
    return verify_rejection(draft, torch.full_like(q, 1 / VOCAB), p, u, n, **more)


def forgets_the_drafts_filter(draft, q, p, u, n, **more):
    return verify_rejection(draft, 0.9 * q + 0.1 / VOCAB, p, u, n, **more)


MISTAKES = {
    accepts_everything: METHODS,
    accepts_too_often: METHODS,
    ignores_the_residual: METHODS,
    takes_the_other_methods_residual: ("block",),
    believes_the_draft_was_uniform: METHODS,
    forgets_the_drafts_filter: METHODS,
}


@pytest.mark.parametrize(("mistake", "method"), [(m, method) for m, methods in MISTAKES.items() for method in methods])
def test_a_broken_rule_shows(mistake, method):
    assert distance(Tables(3, False), 2, mistake, method) > WRONG


def test_a_rule_that_only_wastes_drafts_is_no_mistake():
    assert distance(Tables(2, False), 2, accepts_nothing, "standard") < EXACT


def test_block_accepts_more_of_every_draft_length():
    for drafts in (2, 3):
        tables, lengths = Tables(drafts, True), {}
        case = Case(tables, drafts, "cpu")
        for method in METHODS:
            law = round_law(case, verify_rejection, method)
            lengths[method] = sum(
                share * (len(emitted) - 1) * torch.tensor([tables.q[draft[:t]][x] for t, x in enumerate(draft)]).prod()
                for (prefix, draft), outcomes in law.items()
                if not prefix
                for emitted, share in outcomes.items()
            )
        assert lengths["block"] > lengths["standard"] + 1e-3


def test_draws_of_drafts_have_the_probabilities_they_are_judged_by():
    probs = torch.tensor([[0.2, 0.0, 0.5, 0.3], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    edges = probs.double().cumsum(-1) / probs.double().sum(-1, keepdim=True)
    for row, token in itertools.product(range(3), range(4)):
        start = float(edges[row, token - 1]) if token else 0.0
        width = float(edges[row, token]) - start
        if width > 0:
            for uniform in (start + 1e-12 * (start > 0), start + width / 2, float(edges[row, token]) - 1e-12):
                assert draw(probs[row : row + 1], torch.tensor([uniform], dtype=torch.float64)).item() == token
    last = torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)
    assert draw(probs, last).tolist() == [3, 1, 3]
