import pytest
import torch
import torch.nn.functional as F
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
    reference,
    same_bits,
    strided,
)
from tolerances import assert_close

from layerskip_kernels.ops import verify_attention

OP = "verify_attention"
POISON = (float("nan"), float("inf"), float("-inf"))


def case(inputs, *, window=3, heads=4, groups=2, dim=16, lengths=(5, 0, 37), num_slots=4, capacity=48, **more):
    """Arguments whose cache holds NaN and infinities wherever no row may look."""
    batch = len(lengths)
    caches = {}
    for name in ("k_cache", "v_cache"):
        cache = torch.empty(num_slots, groups, capacity, dim, dtype=inputs.dtype, device=inputs.device)
        for i, poison in enumerate(POISON):
            cache[:, :, i::3] = poison
        caches[name] = cache
    slot_ids, num_queries = more.get("slot_ids"), more.get("num_queries")
    for b, length in enumerate(lengths):
        slot = b if slot_ids is None else int(slot_ids[b])
        valid = length + (window if num_queries is None else int(num_queries[b]))
        if num_queries is None or num_queries[b]:
            for cache in caches.values():
                cache[slot, :, :valid] = inputs.randn(groups, valid, dim)
    q = inputs.randn(batch, window, heads, dim)
    if num_queries is not None:
        for b, rows in enumerate(num_queries.tolist()):
            q[b, rows:] = float("nan")
    return dict(q=q, **caches, lengths=inputs.int32(*lengths), scale=dim**-0.5, **more)


def tree(*parents):
    """Window mask of a token tree given by each row's parent (-1: the root)."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            mask[row] |= mask[parent]
    return mask


def sdpa(q, k_cache, v_cache, *, lengths, scale, slot_ids=None, num_queries=None, tree_mask=None, sliding_window=None):
    """The same with torch's attention in float64, one sequence at a time, masks spelt out element by element."""
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        rows = q.shape[1] if num_queries is None else int(num_queries[b])
        slot = b if slot_ids is None else int(slot_ids[b])
        mask = torch.zeros(rows, length + rows, dtype=torch.bool)
        for t in range(rows):
            for j in range(length + rows):
                u = j - length
                seen = u < 0 or (u <= t if tree_mask is None else bool(tree_mask[t, u]))
                mask[t, j] = seen and (sliding_window is None or j > length + t - sliding_window)
        if rows:
            kv = [cache[None, slot, :, : length + rows].double() for cache in (k_cache, v_cache)]
            query = q[b : b + 1, :rows].double().transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                query, *kv, attn_mask=mask.to(q.device), scale=scale, enable_gqa=True
            )
            out[b, :rows] = attended[0].transpose(0, 1).to(q.dtype)
    return out


SHAPES = [
    dict(dim=8, heads=1, groups=1, window=1, lengths=(0,), capacity=1, num_slots=1),
    dict(dim=64, heads=6, groups=2, window=5, lengths=(1, 300, 63), capacity=310),
    dict(dim=104, heads=7, groups=7, window=2, lengths=(83, 64), capacity=90),
    dict(dim=128, heads=8, groups=1, window=7, lengths=(769,), capacity=777),
    dict(dim=256, heads=2, groups=1, window=64, lengths=(0, 129), capacity=200),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"D{s['dim']}-T{s['window']}")
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_torch(backend, dtype, shape):
    args = case(Inputs(backend.device, dtype), **shape)
    assert_close(verify_attention(**args), sdpa(**args))


MASKS = {
    "ragged": dict(num_queries=(1, 0, 5)),
    "slots": dict(slot_ids=(3, 1, 0)),
    "tree": dict(tree_mask=tree(-1, 0, 0, 1, 2)),
    "window1": dict(sliding_window=1),
    "window4": dict(sliding_window=4),
    "window40": dict(sliding_window=40),
    "all": dict(num_queries=(2, 5, 4), slot_ids=(2, 0, 3), tree_mask=tree(-1, 0, 0, 2, 1), sliding_window=9),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_masks(backend, dtype, mask):
    inputs = Inputs(backend.device, dtype)
    mask = {n: inputs.int32(*v) if isinstance(v, tuple) else v for n, v in MASKS[mask].items()}
    if "tree_mask" in mask:
        mask["tree_mask"] = mask["tree_mask"].to(backend.device)
    args = case(inputs, window=5, **mask)
    expected, *_ = reference(verify_attention, **args)
    assert_close(expected, sdpa(**{n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in args.items()}))
    result = verify_attention(**args)
    assert_close(result, expected)
    if "num_queries" in mask:
        for b, rows in enumerate(mask["num_queries"].tolist()):
            assert (result[b, rows:] == 0).all()


@pytest.mark.parametrize("heads", (4, 12), ids=("few_rows", "many_rows"))
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_what_a_row_must_not_see_never_matters(backend, dtype, heads):
    """NaN and infinities in later window rows, siblings and behind the sliding window: 0 times NaN would show."""
    inputs = Inputs(backend.device, dtype)
    clean = case(
        inputs, window=4, heads=heads, lengths=(20,), sliding_window=6, tree_mask=tree(-1, 0, 0, 1).to(backend.device)
    )
    expected = verify_attention(**clean)
    dirty = clone(clean)
    for cache in ("k_cache", "v_cache"):
        dirty[cache][:, :, :15] = float("nan")  # row 0 sees storage 15 and later
        dirty[cache][:, :, 22] = float("inf")  # window row 2, which rows 0, 1 and 3 do not see
    dirty["q"][:, 2] = float("nan")
    result = verify_attention(**dirty)
    assert_close(result[:, [0, 1, 3]], expected[:, [0, 1, 3]])


@pytest.mark.parametrize("heads", (4, 12), ids=("few_rows", "many_rows"))  # of a KV head, times the window
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_what_a_row_sees_shows(backend, dtype, heads):
    """One NaN in V, in the window itself and far before it: it reaches all rows that see it, and no other."""
    inputs = Inputs(backend.device, dtype)
    clean = case(inputs, window=4, heads=heads, lengths=(70, 70, 70), capacity=80)
    expected = verify_attention(**clean)
    for position, blind in ((72, 2), (3, 0)):  # storage 72 is window row 2
        dirty = clone(clean)
        dirty["v_cache"][:, :, position, 5] = float("nan")
        result = verify_attention(**dirty)
        assert result[:, blind:, :, 5].isnan().all()
        if backend.name in (
            "cuda",
            "triton",
        ):  # all columns, so that it doesn't matter with which others a tile is shared
            assert result[:, blind:].isnan().all()
        assert same_bits(result[:, :blind], expected[:, :blind])


def test_scores_of_any_size(backend):
    """Softmax subtracts the maximum: scores in the thousands neither overflow nor vanish."""
    args = case(Inputs(backend.device), lengths=(30,))
    for shift in (1e3, -1e3):
        shifted = {**args, "q": args["q"] * abs(shift), "k_cache": args["k_cache"] * (1 if shift > 0 else -1)}
        assert_close(verify_attention(**shifted), sdpa(**shifted))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_strided_views_and_canaries(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    args = case(inputs, num_queries=inputs.int32(3, 0, 2))
    expected, *_ = reference(verify_attention, **args)
    out = Guarded(args["q"].shape, dtype, backend.device)
    views = {n: strided(args[n]) for n in ("q", "k_cache", "v_cache")}
    before = clone(views)
    assert verify_attention(**{**args, **views}, out=out.view) is out.view
    assert_close(out.view, expected)
    out.assert_surroundings_unchanged()
    assert all(same_bits(views[n], before[n]) for n in views)


def test_cache_with_positions_outside_heads(backend):
    """[slots, S, G, D] in memory."""
    args = case(Inputs(backend.device))
    expected = verify_attention(**args)
    for name in ("k_cache", "v_cache"):
        args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(verify_attention(**args), expected)


INVARIANCE = [
    dict(dim=64, window=6, heads=8),  # 24 query rows per KV head: more than a warp takes
    dict(dim=40, window=6, sliding_window=50),
    pytest.param(dict(dim=128, window=17, heads=6), marks=pytest.mark.long_interpreted),
]


@pytest.mark.parametrize("shape", INVARIANCE, ids=lambda s: f"D{s['dim']}-T{s['window']}")
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_a_row_depends_on_itself_alone(kernels, dtype, shape):
    """One window at once equals row by row, alone, in a larger cache, next to NaN, with 1 or 2 threads."""
    inputs = Inputs(kernels.device, dtype)
    args = case(inputs, lengths=(250, 0, 61, 513), capacity=540, **shape)
    window = shape["window"]
    rows = torch.empty_like(args["q"])
    for b, length in enumerate((250, 0, 61, 513)):
        for t in range(window):
            one = {**args, "q": args["q"][b : b + 1, t : t + 1], "lengths": inputs.int32(length + t)}
            rows[b, t] = verify_attention(**one, slot_ids=inputs.int32(b))[0, 0]

    slot_ids = inputs.int32(5, 2, 0, 3)
    elsewhere = {**args, "slot_ids": slot_ids}
    for name in ("k_cache", "v_cache"):
        larger = torch.full((7, 2, 700, shape["dim"]), float("nan"), dtype=dtype, device=kernels.device)
        larger[slot_ids.long(), :, :540] = args[name]
        elsewhere[name] = larger
    poisoned = clone(args)
    poisoned["q"][1::2] = float("nan")
    for name in ("k_cache", "v_cache"):
        poisoned[name][1::2] = float("inf")
    for threads in (1, 2):
        with num_threads(threads):
            assert same_bits(verify_attention(**args), rows)
            assert same_bits(verify_attention(**elsewhere), rows)
            assert same_bits(verify_attention(**args, out=torch.empty_like(rows)), rows)
            assert same_bits(verify_attention(**poisoned)[::2], rows[::2])
            ragged = verify_attention(**args, num_queries=inputs.int32(window, 0, 2, 1))
            assert same_bits(ragged[0], rows[0]) and same_bits(ragged[2, :2], rows[2, :2])
            assert same_bits(ragged[3, :1], rows[3, :1]) and (ragged[1] == 0).all()


def arguments():
    inputs = Inputs("cpu")
    args = case(inputs, slot_ids=inputs.int32(2, 0, 1), num_queries=inputs.int32(3, 1, 0), tree_mask=tree(-1, 0, 0))
    return args | dict(out=torch.zeros_like(args["q"]))


@bad_tensors(
    "q", "k_cache", "v_cache", "lengths", "slot_ids", "num_queries", "tree_mask", "out", free_size=("q",)
)  # fmt: skip
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(verify_attention, arguments(), path, defect)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.ones(3, 3, 4, 12)), ValueError, r"D=12: choose a multiple of 8 in 8\.\.256"),
        (dict(q=torch.ones(3, 3, 4, 264)), ValueError, r"D=264: choose a multiple of 8 in 8\.\.256"),
        (dict(q=torch.ones(3, 3, 3, 16), out=None), ValueError, "H=3: must be a multiple of the cache's 2 KV heads"),
        (dict(sliding_window=0), ValueError, "sliding_window=0: must be at least 1, or None"),
        (dict(scale=0.0), ValueError, "scale=0.0: must be > 0"),
        (dict(scale=float("nan")), ValueError, "scale=nan: must be > 0"),
        (dict(block_table=torch.ones(3, 2)), ValueError, "block_table: paged caches are not supported"),
        (dict(slot_ids=None, k_cache=torch.ones(2, 2, 8, 16), v_cache=torch.ones(2, 2, 8, 16)), ValueError,
         "slot_ids=None: 3 rows need as many cache slots, there are 2"),
    ],
)  # fmt: skip
def test_rejects(change, error, message):
    assert_rejects(verify_attention, {**arguments(), **change}, error, message)
