import pytest
import torch
from op_inputs import (
    FLOATS,
    Guarded,
    Inputs,
    assert_rejects,
    assert_rejects_tensor,
    bad_tensors,
    clone,
    dtype_name,
    num_threads,
    same_bits,
)

from layerskip_kernels.ops import kv_rollback

OP = "kv_rollback"


def case(inputs, *, keep, lengths=None, window=6, layers=3, groups=2, dim=8, num_slots=5, capacity=20, **more):
    """Caches of distinct whole numbers (exact in every dtype's bits: only moved, never computed with)."""
    shape = (layers, num_slots, groups, capacity, dim)
    lengths = lengths or [3 + 2 * b for b in range(len(keep))]
    return (
        dict(
            k_cache=inputs.randn(*shape),
            v_cache=inputs.randn(*shape),
            lengths=inputs.int32(*lengths),
            keep=inputs.int32(*keep),
            window=window,
        )
        | more
    )


def by_hand(k_cache, v_cache, lengths, keep, *, window, slot_ids=None, path=None, scrub=False):
    """The caches and lengths after the call, element by element into fresh copies."""
    caches = (k_cache.cpu().clone(), v_cache.cpu().clone())
    for b, (start, kept) in enumerate(zip(lengths.tolist(), keep.tolist(), strict=True)):
        slot = b if slot_ids is None else int(slot_ids[b])
        for new, old in zip(caches, (k_cache.cpu(), v_cache.cpu()), strict=True):
            for i in range(window):
                if i < kept and path is not None:
                    new[:, slot, :, start + i] = old[:, slot, :, start + int(path[b, i])]
                elif i >= kept and scrub:
                    new[:, slot, :, start + i] = 0
    return *caches, (lengths + keep).cpu()


def assert_matches(args):
    expected = by_hand(**args)
    untouched = {n: args[n].clone() for n in ("keep", "slot_ids", "path") if args.get(n) is not None}
    assert kv_rollback(**args) is None
    for name, wanted in zip(("k_cache", "v_cache", "lengths"), expected, strict=True):
        assert same_bits(args[name].cpu(), wanted), name
    assert args["lengths"].dtype == torch.int32
    for name, value in untouched.items():
        assert torch.equal(args[name], value), name


@pytest.mark.parametrize("scrub", [False, True], ids=["keep", "scrub"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_chain(backend, dtype, scrub):
    assert_matches(case(Inputs(backend.device, dtype), keep=(0, 1, 6), scrub=scrub))


PATHS = {
    "identity": (0, 1, 2, 3, 4, 5),
    "reversal": (5, 4, 3, 2, 1, 0),
    "shift down": (1, 2, 3, 4, 5, 0),
    "shift up": (5, 0, 1, 2, 3, 4),
    "all from one": (2, 2, 2, 2, 2, 2),
    "swaps": (1, 0, 3, 2, 5, 4),
    "branch": (0, 2, 5, 5, 5, 5),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_overlapping_moves(backend, dtype, path):
    """Every read before any write, whatever the order of the moves."""
    rows = torch.tensor([PATHS[path]] * 3, dtype=torch.int32, device=backend.device)
    assert_matches(case(Inputs(backend.device, dtype), keep=(6, 3, 1), path=rows))


@pytest.mark.parametrize("scrub", [False, True], ids=["keep", "scrub"])
def test_random_paths_slots_and_shapes(backend, scrub):
    for seed in range(6):
        inputs = Inputs(backend.device, seed=seed)
        window = (1, 2, 5, 9, 16, 17)[seed]
        keep = [int(k) for k in inputs.ids(window + 1, 4)]
        path = inputs.ids(window, 4, window).int()
        slot_ids = inputs.int32(6, 2, 0, 3)
        lengths = [int(n) for n in inputs.ids(9, 4)]
        more = dict(path=path, slot_ids=slot_ids, scrub=scrub, num_slots=7, capacity=26, dim=(8, 24, 64)[seed % 3])
        assert_matches(case(inputs, keep=keep, lengths=lengths, window=window, **more))


def test_entries_of_path_beyond_keep_are_ignored(backend):
    path = torch.tensor([[2, 99, -7], [-1, -1, -1]], dtype=torch.int32, device=backend.device)
    args = case(Inputs(backend.device), keep=(1, 0), window=3, path=path)
    assert_matches(args)


def test_up_to_the_last_position(backend):
    args = case(Inputs(backend.device), keep=(6, 2), lengths=[14, 14], scrub=True)
    assert_matches(args)


def test_nan_and_infinities_move_and_scrub_alike(backend):
    args = case(
        Inputs(backend.device), keep=(2,), lengths=[1], path=Inputs(backend.device).int32(3, 4, 0, 0, 0, 0)[None]
    )
    for name in ("k_cache", "v_cache"):
        args[name][:, 0, :, 4], args[name][:, 0, :, 6] = float("nan"), float("inf")
    assert_matches({**args, "scrub": True})


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_views_and_canaries(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    path = inputs.ids(6, 3, 6).int()
    args = case(inputs, keep=(2, 6, 0), path=path, scrub=True, slot_ids=inputs.int32(4, 1, 2))
    guarded = {n: Guarded.of(args[n]) for n in ("k_cache", "v_cache", "lengths")}
    assert_matches({**args, **{n: g.view for n, g in guarded.items()}})
    for guard in guarded.values():
        guard.assert_surroundings_unchanged()


def test_threads_do_not_matter(kernels):
    inputs = Inputs(kernels.device)
    args = case(inputs, keep=(5, 2, 6), layers=7, path=inputs.ids(6, 3, 6).int(), scrub=True)
    for threads in (1, 2):
        with num_threads(threads):
            assert_matches(clone(args))


def arguments():
    inputs = Inputs("cpu")
    path = inputs.ids(6, 3, 6).int()
    return case(inputs, keep=(2, 6, 0), slot_ids=inputs.int32(4, 1, 2), path=path, scrub=True)


@bad_tensors("k_cache", "v_cache", "lengths", "keep", "slot_ids", "path", free_size=("lengths",))
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(kv_rollback, arguments(), path, defect)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=0, path=None), r"window=0: choose 1\.\.20"),
        (dict(window=21, path=None), r"window=21: choose 1\.\.20"),
        (dict(window=5), r"path: shape \[3, 6\], expected \[3, 5\]"),
        (dict(lengths=torch.ones(2, dtype=torch.int32)), r"keep: shape \[3\], expected \[2\]"),
        (dict(block_table=torch.ones(3, 2)), "block_table: paged caches are not supported"),
        (dict(slot_ids=None, k_cache=torch.ones(3, 2, 2, 20, 8), v_cache=torch.ones(3, 2, 2, 20, 8)),
         "slot_ids=None: 3 rows need as many cache slots, there are 2"),
    ],
)  # fmt: skip
def test_rejects(change, message):
    assert_rejects(kv_rollback, {**arguments(), **change}, ValueError, message)
