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
    reference,
    same_bits,
    strided,
)
from tolerances import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from layerskip_kernels.ops import rope_append

OP = "rope_append"


def frequencies(dim, device):
    return (10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)).to(device)


def case(inputs, *, window=3, heads=4, groups=2, dim=16, lengths=(5, 0, 11), num_slots=5, capacity=24, **more):
    """Arguments with a NaN-filled cache, whose every element that changes was written on purpose."""
    batch = len(lengths)
    lengths = inputs.int32(*lengths)
    cache = torch.full((num_slots, groups, capacity, dim), float("nan"), dtype=inputs.dtype, device=inputs.device)
    return (
        dict(
            q=inputs.randn(batch, window, heads, dim),
            k=inputs.randn(batch, window, groups, dim),
            v=inputs.randn(batch, window, groups, dim),
            k_cache=cache,
            v_cache=cache.clone(),
            lengths=lengths,
            positions=lengths[:, None] + torch.arange(window, dtype=torch.int32, device=inputs.device),
            inv_freq=frequencies(dim, inputs.device),
        )
        | more
    )


def assert_equals_reference(arguments):
    _, _, after = reference(rope_append, **arguments)
    before = clone(arguments)
    rope_append(**arguments)
    for name in ("q", "k_cache", "v_cache"):
        assert_close(arguments[name], after[name])
    assert same_bits(arguments["v_cache"].cpu(), after["v_cache"])
    for name in ("k", "v", "lengths", "positions", "inv_freq"):
        assert torch.equal(arguments[name], before[name]), name


@pytest.mark.parametrize("dim", [8, 64, 104, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_transformers(backend, dtype, dim):
    args = case(Inputs(backend.device, dtype), dim=dim, lengths=(0, 7))
    angles = args["positions"][..., None].float() * args["inv_freq"]
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1) for f in (torch.cos, torch.sin))
    q, k = apply_rotary_pos_emb(args["q"].float().transpose(1, 2), args["k"].float().transpose(1, 2), cos, sin)
    v = args["v"].clone()

    rope_append(**args)

    assert_close(args["q"], q.transpose(1, 2).to(dtype))
    for b, length in enumerate((0, 7)):
        assert_close(args["k_cache"][b, :, length : length + 3], k[b].to(dtype))
        assert torch.equal(args["v_cache"][b, :, length : length + 3], v[b].transpose(0, 1))
        assert args["k_cache"][b, :, length + 3 :].isnan().all() and args["k_cache"][b, :, :length].isnan().all()
    assert args["v_cache"][2:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_ragged_window_and_permuted_slots(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    slot_ids, num_queries = inputs.int32(4, 0, 2), inputs.int32(1, 0, 3)
    args = case(inputs, slot_ids=slot_ids, num_queries=num_queries)
    before = clone(args)
    assert_equals_reference(args)
    assert torch.equal(args["q"][1], before["q"][1]) and torch.equal(args["q"][0, 1:], before["q"][0, 1:])
    written = ~args["v_cache"].isnan().all(dim=3).all(dim=1)  # [slots, S]
    assert written.nonzero().tolist() == [[2, 11], [2, 12], [2, 13], [4, 5]]


@pytest.mark.parametrize("window", [1, 5, 64])
def test_frequencies_per_row_and_attention_factor(backend, window):
    inputs = Inputs(backend.device)
    per_row = inputs.uniform(3, window, 8)
    assert_equals_reference(case(inputs, window=window, capacity=80, inv_freq=per_row, attention_factor=1.25))


def test_positions_need_not_be_storage_indices(backend):
    """A token tree: siblings share a position."""
    inputs = Inputs(backend.device)
    positions = torch.tensor([[5, 6, 6], [0, 1, 1], [131071, 7, 2]], dtype=torch.int32, device=backend.device)
    assert_equals_reference(case(inputs, positions=positions))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_no_rotation(backend, dtype):
    """Zero frequencies, factor 1: layers without RoPE keep q and k to the bit."""
    args = case(Inputs(backend.device, dtype), inv_freq=torch.zeros(8, device=backend.device))
    before = clone(args)
    rope_append(**args)
    assert torch.equal(args["q"], before["q"])
    assert torch.equal(args["k_cache"][2, :, 11:14], before["k"][2].transpose(0, 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_strided_views_and_canaries(backend, dtype):
    """q, k, v as slices of one packed projection; the caches as views into larger buffers."""
    inputs = Inputs(backend.device, dtype)
    packed = Guarded.of(inputs.randn(3, 3, 8 * 16))
    args = case(inputs)
    for name, heads in (("q", slice(0, 4)), ("k", slice(4, 6)), ("v", slice(6, 8))):
        args[name] = packed.view.unflatten(2, (8, 16))[:, :, heads]
    k_cache, v_cache = Guarded.of(args["k_cache"]), Guarded.of(args["v_cache"])
    assert_equals_reference({**args, "k_cache": k_cache.view, "v_cache": v_cache.view})
    for guarded in (packed, k_cache, v_cache):
        guarded.assert_surroundings_unchanged()


def test_other_cache_layouts(backend):
    """[slots, S, G, D] in memory, and k and v interleaved in one buffer."""
    inputs = Inputs(backend.device)
    buffer = torch.full((5, 24, 2, 2, 16), float("nan"), device=backend.device)
    assert_equals_reference(
        case(inputs, k_cache=buffer[:, :, 0].transpose(1, 2), v_cache=buffer[:, :, 1].transpose(1, 2))
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_a_row_depends_on_itself_alone(kernels, dtype):
    """One window at once equals row by row, alone, in another slot, next to NaN, with 1 or 2 threads."""
    inputs = Inputs(kernels.device, dtype)
    args = case(inputs, window=5, dim=72)
    rows = clone(args)
    for b in range(3):
        for t in range(5):
            one = {n: rows[n][b : b + 1, t : t + 1].clone() for n in ("q", "k", "v", "positions")}
            rope_append(
                **one,
                k_cache=rows["k_cache"],
                v_cache=rows["v_cache"],
                lengths=rows["lengths"][b : b + 1] + t,
                inv_freq=rows["inv_freq"],
                slot_ids=inputs.int32(b),
            )
            rows["q"][b, t] = one["q"][0, 0]
    for threads in (1, 2):
        with num_threads(threads):
            whole = clone(args)
            rope_append(**whole)
            for name in ("q", "k_cache", "v_cache"):
                assert same_bits(whole[name], rows[name]), name
            poisoned = clone(args)
            poisoned["q"][1], poisoned["k"][1] = float("nan"), float("inf")
            poisoned = {n: strided(v) if n in ("q", "k", "v", "k_cache", "v_cache") else v for n, v in poisoned.items()}
            rope_append(**poisoned)
            for name in ("q", "k_cache", "v_cache"):
                assert same_bits(poisoned[name][::2], rows[name][::2]), name


def arguments():
    inputs = Inputs("cpu")
    return {n: v.nan_to_num(0.5) for n, v in case(inputs, slot_ids=inputs.int32(2, 0, 1)).items()} | dict(
        num_queries=inputs.int32(3, 1, 0)
    )


TENSORS = ("q", "k", "v", "k_cache", "v_cache", "lengths", "positions", "inv_freq", "slot_ids", "num_queries")


@bad_tensors(*TENSORS, free_size=("q",))
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(rope_append, arguments(), path, defect)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=torch.ones(3, 3, 4, 4)), ValueError, r"D=4: choose .*8\.\.256"),
        (dict(q=torch.ones(3, 3, 4, 12)), ValueError, r"D=12: choose a multiple of 8 in 8\.\.256"),
        (dict(q=torch.ones(3, 3, 4, 264)), ValueError, r"D=264: choose .*8\.\.256"),
        (dict(k=torch.ones(3, 3, 1, 16)), ValueError, r"v: shape \[3, 3, 2, 16\], expected \[3, 3, 1, 16\]"),
        (dict(k_cache=torch.ones(5, 2, 24, 16).half()), TypeError, "v_cache: dtype|k_cache: dtype float16"),
        (dict(inv_freq=torch.ones(3, 2, 8)), ValueError, r"inv_freq: shape \[3, 2, 8\], expected \[3, 3, 8\]"),
        (dict(slot_ids=None, k_cache=torch.ones(2, 2, 24, 16), v_cache=torch.ones(2, 2, 24, 16)), ValueError,
         "slot_ids=None: 3 rows need as many cache slots, there are 2"),
        (dict(attention_factor=float("nan")), ValueError, "attention_factor=nan: must be > 0"),
        (dict(attention_factor=0.0), ValueError, "attention_factor=0.0: must be > 0"),
        (dict(block_table=torch.ones(3, 2)), ValueError, "block_table: paged caches are not supported"),
    ],
)  # fmt: skip
def test_rejects(change, error, message):
    assert_rejects(rope_append, {**arguments(), **change}, error, message)
