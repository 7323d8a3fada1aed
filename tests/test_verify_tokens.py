import itertools

import pytest
import torch
from op_inputs import Guarded, Inputs, assert_rejects, assert_rejects_tensor, bad_tensors, num_threads

from layerskip_kernels.ops import Verified, verify_tokens

OP = "verify_tokens"


def by_hand(draft, target, num_draft, eos, remaining, finished):
    """One sequence, one token at a time: emitted tokens, how many of them were drafts, finished."""
    emitted, accepted = [], 0
    while not finished and len(emitted) < remaining:
        i = len(emitted)
        matches = i < num_draft and draft[i] == target[i]
        emitted.append(target[i])
        accepted += matches
        if target[i] in eos:
            return emitted, accepted, True
        if not matches:
            break
    return emitted, accepted, finished or len(emitted) >= remaining


def assert_matches_by_hand(result, rows, eos, width):
    tokens, emitted, accepted, finished = (t.tolist() for t in result)
    for i, row in enumerate(rows):
        wanted, wanted_accepted, wanted_finished = by_hand(*row[:3], eos, *row[3:])
        assert tokens[i] == wanted + [-1] * (width - len(wanted)), row
        assert (emitted[i], accepted[i], finished[i]) == (len(wanted), wanted_accepted, wanted_finished), row


def call(backend, rows, eos, **more):
    """All rows (draft, target, num_draft, remaining, finished) in one call."""
    draft, target, num_draft, remaining, finished = zip(*rows, strict=True)
    device = backend.device
    return verify_tokens(
        torch.tensor(draft, dtype=torch.int64, device=device).view(len(rows), -1),
        torch.tensor(target, device=device),
        torch.tensor(num_draft, dtype=torch.int32, device=device),
        eos_ids=torch.tensor(eos, dtype=torch.int64, device=device),
        remaining=torch.tensor(remaining, dtype=torch.int32, device=device),
        finished=torch.tensor(finished, device=device),
        **more,
    )


@pytest.mark.parametrize("eos", [(), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize(("drafts", "vocab"), [(0, 3), (1, 3), (2, 3), (3, 2)])
def test_every_small_case(backend, drafts, vocab, eos):
    """Every draft, target, num_draft, remaining and finished there is."""
    rows = [
        (draft, target, num_draft, remaining, finished)
        for draft in itertools.product(range(vocab), repeat=drafts)
        for target in itertools.product(range(vocab), repeat=drafts + 1)
        for num_draft in range(drafts + 1)
        for remaining in range(drafts + 3)
        for finished in (False, True)
    ]
    result = call(backend, rows, eos)
    assert isinstance(result, Verified)
    assert [t.dtype for t in result] == [torch.int64, torch.int32, torch.int32, torch.bool]
    assert_matches_by_hand(result, rows, eos, drafts + 1)


def random_rows(inputs, batch, drafts):
    draft, target = inputs.ids(2, batch, drafts), inputs.ids(2, batch, drafts + 1)
    target[::2, :drafts] = draft[::2]
    num_draft, remaining = inputs.ids(drafts + 1, batch), inputs.ids(drafts + 4, batch)
    finished = inputs.ids(5, batch) == 0
    return list(zip(*(t.tolist() for t in (draft, target, num_draft, remaining, finished)), strict=True))


@pytest.mark.parametrize("drafts", [1, 7, 16, 63])
def test_many_rows_of_any_width(backend, drafts):
    rows = random_rows(Inputs("cpu", seed=drafts), 83, drafts)
    for threads in (1, 2):
        with num_threads(threads):
            assert_matches_by_hand(call(backend, rows, (7,)), rows, (7,), drafts + 1)


def test_large_token_ids_and_many_eos(backend):
    """Ids are 64 bits; 2³² + 5 is not 5."""
    big = 2**32 + 5
    rows = [((big, 3), (big, 3, 4), 2, 9, False), ((5, 3), (big, 3, 4), 2, 9, False), ((3, 4), (3, 4, 5), 2, 9, False)]
    for eos in ((), (5,), (big,), (*range(100, 180), 5)):
        assert_matches_by_hand(call(backend, rows, eos), rows, eos, 3)


def test_out_with_canaries_and_finished_in_place(backend):
    rows = random_rows(Inputs("cpu"), 9, 4)
    shapes = ((9, 5), (9,), (9,), (9,))
    dtypes = (torch.int64, torch.int32, torch.int32, torch.bool)
    guarded = [Guarded(s, d, backend.device) for s, d in zip(shapes, dtypes, strict=True)]
    out = Verified(*(g.view for g in guarded))
    result = call(backend, rows, (1,), out=out)
    assert all(a is b for a, b in zip(result, out, strict=True))
    assert_matches_by_hand(result, rows, (1,), 5)
    for guard in guarded:
        guard.assert_surroundings_unchanged()

    args = arguments(backend.device)
    expected = verify_tokens(**{**args, "out": None})
    assert (
        verify_tokens(**{**args, "out": args["out"]._replace(finished=args["finished"])}).finished is args["finished"]
    )
    assert torch.equal(args["finished"], expected.finished)


def test_views(backend):
    """draft and target as columns of one wider buffer."""
    rows = random_rows(Inputs("cpu"), 9, 4)
    draft, target, num_draft, remaining, finished = (
        torch.tensor(c, device=backend.device) for c in zip(*rows, strict=True)
    )
    buffer = torch.cat((draft, target), dim=1)
    result = verify_tokens(
        buffer[:, :4],
        buffer[:, 4:],
        num_draft.int(),
        eos_ids=torch.tensor([1], device=backend.device),
        remaining=remaining.int(),
        finished=finished,
    )
    assert_matches_by_hand(result, rows, (1,), 5)


def arguments(device="cpu"):
    inputs = Inputs(device)
    out = Verified(
        torch.zeros(3, 5, dtype=torch.int64, device=device),
        inputs.int32(0, 0, 0),
        inputs.int32(0, 0, 0),
        torch.zeros(3, dtype=torch.bool, device=device),
    )
    return dict(
        draft=inputs.ids(9, 3, 4),
        target=inputs.ids(9, 3, 5),
        num_draft=inputs.int32(4, 4, 2),
        eos_ids=torch.tensor([2, 5], device=device),
        remaining=inputs.int32(9, 9, 1),
        finished=torch.tensor([False, True, False], device=device),
        out=out,
    )


@bad_tensors(
    "draft", "target", "num_draft", "eos_ids", "remaining", "finished",
    "out.tokens", "out.num_emitted", "out.num_accepted", "out.finished", free_size=("eos_ids",),
)  # fmt: skip
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(verify_tokens, arguments(), path, defect)


@pytest.mark.parametrize("out", [torch.zeros(3, 5), (torch.zeros(3, 5),) * 4, 5], ids=["tensor", "tuple", "int"])
def test_rejects_out(out):
    message = f"out: expected a Verified, got {type(out).__name__}"
    assert_rejects(verify_tokens, {**arguments(), "out": out}, TypeError, message)
