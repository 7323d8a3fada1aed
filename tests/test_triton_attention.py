"""verify_attention's Triton kernels where chunks change their size, scratch is dirty, or windows are cut in parts."""

import importlib

import pytest
import torch
from op_inputs import FLOATS, Inputs, dtype_name, same_bits
from test_verify_attention import case, sdpa, tree
from tolerances import assert_close

import layerskip_kernels as lk
from layerskip_kernels.ops import verify_attention
from layerskip_kernels.triton.launch import DEVICE_TYPE, INTERPRETED

BACKEND = "triton"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
# Chunks of 16 positions up to a span of 48, then 32 up to 96, 64 up to 192, 128.
SMALL = dict(BLOCK_M=16, BLOCK_N=16, MIN_CHUNK=16, SLOTS=4, num_warps=4, num_stages=2)
module = importlib.import_module("layerskip_kernels.triton.verify_attention")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "choose", lambda *model: SMALL)
    monkeypatch.setattr(module.configs, "tuned", lambda op, tensor, heuristic, **sizes: heuristic)
    with lk.use_backend("triton"):
        yield


def inputs(dtype=torch.float32):
    return Inputs(DEVICE_TYPE, dtype)


def one_by_one(args, lengths, window):
    """Each row of each sequence in a call of its own."""
    rows = torch.empty_like(args["q"])
    for b, length in enumerate(lengths):
        own = dict(lengths=inputs().int32(0), slot_ids=inputs().int32(b))
        for t in range(window):
            own["lengths"] = inputs().int32(length + t)
            rows[b, t] = verify_attention(**{**args, "q": args["q"][b : b + 1, t : t + 1], **own})[0, 0]
    return rows


@pytest.mark.parametrize("sliding_window", [None, 1, 33, 47, 100])
def test_windows_across_the_positions_where_chunks_double(sliding_window):
    lengths, window = (45, 94, 190, 30), 5
    args = case(
        inputs(), window=window, heads=2, groups=1, lengths=lengths, capacity=200, sliding_window=sliding_window
    )
    result = verify_attention(**args)
    assert_close(result, sdpa(**args))
    assert same_bits(result, one_by_one(args, lengths, window))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("sliding_window", [None, 40])
def test_trees(dtype, sliding_window):
    mask = tree(-1, *(max(0, i - 1 - i % 3) for i in range(1, 9))).to(DEVICE_TYPE)
    shape = dict(window=9, heads=4, groups=1, lengths=(90, 3, 170), capacity=200, sliding_window=sliding_window)
    args = case(inputs(dtype), tree_mask=mask, **shape)
    expected = sdpa(**{name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in args.items()})
    assert_close(verify_attention(**args), expected)


def test_scratch_is_written_before_it_is_read(monkeypatch):
    args = case(inputs(), lengths=(45, 0, 150), capacity=160, num_queries=inputs().int32(3, 0, 2), sliding_window=70)
    expected = verify_attention(**args)
    monkeypatch.setattr(module.torch, "empty", lambda *size, **how: torch.full(size, float("nan"), **how))
    assert same_bits(verify_attention(**args), expected)


def test_parts_of_a_long_window_have_the_same_bits(monkeypatch):
    args = case(inputs(), window=23, lengths=(45, 0, 90), capacity=130, num_queries=inputs().int32(23, 4, 9))
    expected = verify_attention(**args)
    for scratch in (1, 4 * 4 * 18 * 4 * 23, 2 * 4 * 4 * 18 * 4 * 23):  # rows: one, one window, two windows
        monkeypatch.setattr(module, "SCRATCH_BYTES", scratch)
        assert same_bits(verify_attention(**args), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_poison_that_a_row_sees_shows_in_it_alone(name, poison):
    """In a key or value of window row 2: rows 2 and 3 are not finite, the rows before have the bits they had."""
    args = case(inputs(), window=4, heads=2, groups=1, lengths=(60,), num_slots=1, capacity=64)
    expected = verify_attention(**args)
    args[name][:, :, 62, 3] = poison
    result = verify_attention(**args)
    assert same_bits(result[:, :2], expected[:, :2])
    if name == "v_cache" or poison != float("inf"):  # a score of minus infinity only takes the key out
        assert result[:, 2:].isnan().all()
    assert same_bits(result, one_by_one(args, (60,), 4))
