"""Rejection sampling emits the target's distribution, whatever the draft's: shown by integrating over the uniforms."""

import itertools
from importlib import import_module

import pytest
import torch
from op_inputs import Guarded, Inputs, assert_rejects, assert_rejects_tensor, bad_tensors, clone, num_threads, reference

import layerskip_kernels as lk
from layerskip_kernels.ops import Verified, verify_rejection

OP = "verify_rejection"
METHODS = ("standard", "block")
POINTS = 600  # of the lattice that the uniforms are integrated over
ERROR = 0.02  # total difference of probabilities that the lattice leaves


def distributions(generator, *shape):
    """Random probabilities, some of them zero."""
    weights = torch.rand(shape, generator=generator)
    weights[torch.rand(shape, generator=generator) < 0.15] = 0
    weights[..., 0] += 0.05
    return weights / weights.sum(dim=-1, keepdim=True)


class Model:
    """A draft's and a target's next-token probabilities after every prefix: a table [V, …, V] for each length."""

    def __init__(self, seed, drafts, vocab=3):
        generator = torch.Generator().manual_seed(seed)
        self.drafts, self.vocab = drafts, vocab
        self.q = [distributions(generator, *(vocab,) * n) for n in range(1, drafts + 1)]
        self.p = [distributions(generator, *(vocab,) * n) for n in range(1, drafts + 2)]

    def target(self):
        """Joint probabilities of the next drafts + 1 tokens."""
        joint = torch.ones((), dtype=torch.float64)
        for table in self.p:
            joint = joint[..., None] * table.double()
        return joint


def lattice(dimensions):
    """POINTS evenly spread points of the unit cube: multiples of the powers of the generalised golden ratio."""
    ratio = 2.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -torch.arange(1, dimensions + 1, dtype=torch.float64)
    return (0.5 + torch.arange(1, POINTS + 1)[:, None] * steps) % 1


def run_model(device, model, method):
    """Joint distribution of drafts + 1 tokens, emitted and then continued with the target; mean number accepted."""
    drafts, vocab = model.drafts, model.vocab
    joint, accepted_mean = torch.zeros((vocab,) * (drafts + 1), dtype=torch.float64), 0.0
    points = lattice(drafts + 1).float().clamp(max=1 - 2**-24)
    uniforms = torch.full((POINTS, drafts + 1, 2), 0.5)
    uniforms[:, :drafts, 0] = points[:, :drafts]
    uniforms[:, :, 1] = points[:, drafts:]
    for draft in itertools.product(range(vocab), repeat=drafts):
        q = torch.stack([model.q[n][draft[:n]] for n in range(drafts)])
        p = torch.stack([model.p[n][draft[:n]] for n in range(drafts + 1)])
        weight = float(q.double()[range(drafts), draft].prod()) / POINTS
        if weight == 0:
            continue
        result = verify_rejection(
            torch.tensor(draft, device=device).expand(POINTS, drafts).contiguous(),
            q.to(device).expand(POINTS, -1, -1).contiguous(),
            p.to(device).expand(POINTS, -1, -1).contiguous(),
            uniforms.to(device),
            torch.full((POINTS,), drafts, dtype=torch.int32, device=device),
            method=method,
            **unlimited(POINTS, device),
        )
        assert torch.equal(result.num_emitted, result.num_accepted + 1)
        accepted_mean += float(result.num_accepted.sum()) * weight
        for tokens, count in zip(result.tokens.tolist(), result.num_emitted.tolist(), strict=True):
            emitted = tuple(tokens[:count])
            following = torch.tensor(weight, dtype=torch.float64)
            for table in model.p[count:]:
                following = following[..., None] * table[emitted].double()
            joint[emitted] += following
    return joint, accepted_mean


def unlimited(rows, device):
    """No EOS, no end."""
    return dict(
        eos_ids=torch.tensor([], dtype=torch.int64, device=device),
        remaining=torch.full((rows,), 99, dtype=torch.int32, device=device),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
    )


def distance_from_target(device, method, drafts, seed):
    model = Model(seed, drafts)
    joint, _ = run_model(device, model, method)
    assert abs(float(joint.sum()) - 1) < 1e-5
    return float((joint - model.target()).abs().sum())


@pytest.mark.long_interpreted
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_emits_the_target_distribution(backend, method, drafts, seed):
    assert distance_from_target(backend.device, method, drafts, seed) < ERROR


def no_residual(right, x, q, p, u):
    """After a rejection draws from p: the classic mistake."""
    accepted, _ = right(x, q, p, u)
    return accepted, p[accepted]


def too_generous(right, x, q, p, u):
    return right(x, q, p, u * 0.8)


@pytest.mark.parametrize("mistake", [no_residual, too_generous])
@pytest.mark.parametrize("method", METHODS)
def test_the_check_notices_a_broken_rule(monkeypatch, method, mistake):
    rules = import_module("layerskip_kernels.reference.verify_rejection")
    right = getattr(rules, f"accept_{method}")
    monkeypatch.setattr(rules, f"accept_{method}", lambda *args: mistake(right, *args))
    with lk.use_backend("reference"):
        assert distance_from_target("cpu", method, 2, 0) > 2 * ERROR


@pytest.mark.long_interpreted
def test_block_accepts_at_least_as_many(backend):
    gains = []
    for seed in range(2):
        model = Model(seed, 2)
        standard, block = (run_model(backend.device, model, method)[1] for method in METHODS)
        gains.append(block - standard)
    assert min(gains) > -0.005 and max(gains) > 0.02


def random_case(inputs, rows, drafts, vocab):
    generator = inputs.generator
    return dict(
        draft=inputs.ids(vocab, rows, drafts),
        draft_probs=distributions(generator, rows, drafts, vocab).clamp(min=1e-4).to(inputs.device),
        target_probs=distributions(generator, rows, drafts + 1, vocab).to(inputs.device),
        uniforms=inputs.uniform(rows, drafts + 1, 2),
        num_draft=inputs.ids(drafts + 1, rows).int(),
        eos_ids=torch.tensor([1, 4], device=inputs.device),
        remaining=inputs.ids(drafts + 4, rows).int(),
        finished=inputs.ids(6, rows) == 0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_equals_reference(backend, method):
    """Ragged num_draft, EOS, ends, up to 15 drafts and 5125 tokens; with 1 and 2 threads, row by row."""
    for seed, (rows, drafts, vocab) in enumerate([(64, 3, 7), (5, 15, 83), (3, 2, 5125), (4, 0, 9)]):
        args = random_case(Inputs(backend.device, seed=seed), rows, drafts, vocab) | dict(method=method)
        expected, *_ = reference(verify_rejection, **args)
        before = clone(args)
        for threads in (1, 2):
            with num_threads(threads):
                for a, b in zip(verify_rejection(**args), expected, strict=True):
                    assert a.dtype == b.dtype and torch.equal(a.cpu(), b)
        row = {n: v[1:2] if isinstance(v, torch.Tensor) and n != "eos_ids" else v for n, v in args.items()}
        assert torch.equal(verify_rejection(**row).tokens.cpu(), expected.tokens[1:2])
        assert all(torch.equal(args[n], before[n]) for n in args if n != "method")


@pytest.mark.parametrize("method", METHODS)
def test_accepts_all_of_an_equal_draft(backend, method):
    args = random_case(Inputs(backend.device), 32, 4, 7) | unlimited(32, backend.device)
    args["target_probs"][:, :4] = args["draft_probs"]
    args["num_draft"][:] = 4
    result = verify_rejection(**args, method=method)
    assert (result.num_accepted == 4).all() and torch.equal(result.tokens[:, :4], args["draft"])


@pytest.mark.parametrize("method", METHODS)
def test_disjoint_draft_is_rejected(backend, method):
    """What the target gives no probability is never emitted."""
    args = random_case(Inputs(backend.device), 32, 3, 4) | unlimited(32, backend.device)
    args["draft"][:] = 0
    args["target_probs"][:] = torch.tensor([0.0, 0.5, 0.0, 0.5], device=backend.device)
    args["uniforms"][:4, :, :] = 0.0
    args["uniforms"][4:8, :, :] = 1 - 2**-24
    result = verify_rejection(**args, method=method)
    assert (result.num_accepted == 0).all()
    assert set(result.tokens[:, 0].tolist()) <= {1, 3}


@pytest.mark.parametrize("method", METHODS)
def test_empty_residual_falls_back_to_the_target(backend, method):
    """Rounding can leave p below q everywhere: rejected, with nothing to draw from but p."""
    args = random_case(Inputs(backend.device), 1, 1, 4) | unlimited(1, backend.device)
    args["draft"][:], args["num_draft"][:] = 2, 1
    args["draft_probs"][:] = torch.tensor([0.0, 0.5, 0.5, 0.0], device=backend.device)
    args["target_probs"][:] = torch.tensor([0.0, 0.4, 0.4, 0.0], device=backend.device)
    for uniform, token in ((0.0, 1), (0.49, 1), (0.51, 2), (1 - 2**-24, 2)):
        args["uniforms"][:] = torch.tensor([0.9, uniform], device=backend.device)
        result = verify_rejection(**args, method=method)
        assert (result.tokens.tolist(), result.num_accepted.tolist()) == ([[token, -1]], [0])


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_finished_rows_may_hold_anything(backend, method, poison):
    args = random_case(Inputs(backend.device), 9, 3, 7)
    args["finished"][::2], args["finished"][1::2] = True, False
    expected = verify_rejection(**args, method=method)
    for name in ("draft_probs", "target_probs", "uniforms"):
        args[name][::2] = poison
    for a, b in zip(verify_rejection(**args, method=method), expected, strict=True):
        assert torch.equal(a, b)
    assert (expected.tokens[::2] == -1).all() and expected.finished[::2].all()


def test_out_with_canaries(backend):
    args = random_case(Inputs(backend.device), 6, 3, 7)
    expected = verify_rejection(**args)
    guarded = [Guarded(t.shape, t.dtype, backend.device) for t in expected]
    out = Verified(*(g.view for g in guarded))
    result = verify_rejection(**args, out=out)
    for guard, a, b, wanted in zip(guarded, result, out, expected, strict=True):
        assert a is b and torch.equal(a, wanted)
        guard.assert_surroundings_unchanged()


def arguments():
    args = random_case(Inputs("cpu"), 3, 4, 7)
    numbers = [torch.zeros(3, dtype=torch.int32) for _ in range(2)]
    return args | dict(out=Verified(torch.zeros(3, 5, dtype=torch.int64), *numbers, torch.zeros(3, dtype=torch.bool)))


@bad_tensors(
    "draft", "draft_probs", "target_probs", "uniforms", "num_draft", "eos_ids", "remaining", "finished",
    "out.tokens", "out.num_emitted", "out.num_accepted", "out.finished", free_size=("eos_ids",),
)  # fmt: skip
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(verify_rejection, arguments(), path, defect)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(method="greedy"), ValueError, "method='greedy': choose standard or block"),
        (dict(method=None), ValueError, "method=None: choose standard or block"),
        (dict(out=torch.zeros(3, 5)), TypeError, "out: expected a Verified, got Tensor"),
        (dict(target_probs=torch.ones(3, 4, 7)), ValueError, r"target_probs: shape \[3, 4, 7\], expected \[3, 5, \*\]"),
    ],
)
def test_rejects(change, error, message):
    assert_rejects(verify_rejection, {**arguments(), **change}, error, message)
