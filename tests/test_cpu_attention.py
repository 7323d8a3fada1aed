"""The native CPU kernels of the attention path beyond what every backend's op tests cover: variants, waves, tiles."""

from types import SimpleNamespace

import pytest
import torch
from op_inputs import FLOATS, Inputs, dtype_name, num_threads, same_bits
from test_decoder_stack import copied, everything
from test_rope_append import case as rope_case
from test_verify_attention import case as attention_case
from test_verify_attention import sdpa, tree
from tolerances import assert_close

from layerskip_kernels.native import _cpu, cpu
from layerskip_kernels.native.cpu.decoder_stack import decoder_stack
from layerskip_kernels.native.cpu.rope_append import rope_append
from layerskip_kernels.native.cpu.swiglu import swiglu
from layerskip_kernels.native.cpu.verify_attention import verify_attention
from layerskip_kernels.ops import DecoderLayers
from layerskip_kernels.reference.decoder_stack import compose

VARIANTS = [name for name in _cpu.build_info()["variants"] if not _cpu.why_variant_unsupported(name)]


@pytest.fixture(params=VARIANTS)
def variant(request):
    before = _cpu.active_variant()
    _cpu.set_variant(request.param)
    yield request.param
    _cpu.set_variant(before)


# (heads, groups) for every number of query rows that share a load of K, over a chunk boundary.
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (4, 1), (9, 3), (7, 1)], ids=str)
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_attention_of_each_variant(variant, dtype, dim, heads):
    shape = dict(heads=heads[0], groups=heads[1], dim=dim, window=3, lengths=(126, 7), capacity=140)
    args = attention_case(Inputs("cpu", dtype), **shape)
    assert_close(verify_attention(**args), sdpa(**args))


@pytest.mark.parametrize("setting", ["chain", "sliding", "tree"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_rows_of_a_long_window(variant, dtype, setting):
    """Several blocks of query rows over several chunks: each row equals the same row alone, on any threads."""
    inputs, window, length = Inputs("cpu", dtype), 150, 300
    more = dict(sliding_window=129) if setting == "sliding" else {}
    if setting == "tree":
        more = dict(tree_mask=tree(-1, *(max(0, i - 1 - i % 3) for i in range(1, window))))
    args = attention_case(inputs, window=window, lengths=(length,), heads=3, groups=1, capacity=460, dim=24, **more)
    with num_threads(1):
        whole = verify_attention(**args)
    assert_close(whole, sdpa(**args))
    with num_threads(3):
        assert same_bits(verify_attention(**args), whole)
    if setting == "tree":
        return
    for t in (0, 1, 83, 84, 85, 127, 149):
        alone = {**args, "q": args["q"][:, t : t + 1], "lengths": args["lengths"] + t}
        assert same_bits(verify_attention(**alone)[:, 0], whole[:, t])


def test_scratch_for_attention_stays_bounded():
    """More partial results than the scratch holds: they are made in several waves, with the same bits."""
    inputs = Inputs("cpu")
    args = attention_case(inputs, window=512, heads=8, groups=2, dim=64, lengths=(2500,), num_slots=1, capacity=3012)
    before = _cpu.workspace_bytes()
    whole = verify_attention(**args)
    assert _cpu.workspace_bytes() - before < 12 << 20
    last = {**args, "q": args["q"][:, -1:], "lengths": args["lengths"] + 511}
    assert same_bits(verify_attention(**last)[:, 0], whole[:, -1])


def test_nan_that_a_row_sees_shows(variant):
    """A poisoned key or value that is visible reaches the result, also between chunks of -inf scores."""
    args = attention_case(Inputs("cpu"), window=1, lengths=(200,), num_slots=1, capacity=201)
    for name in ("k_cache", "v_cache"):
        bad = {**args, name: args[name].clone()}
        bad[name][:, :, 150] = float("nan")
        assert verify_attention(**bad).isnan().all()
    infinite = {**args, "k_cache": args["k_cache"].clone()}
    infinite["k_cache"][:, :, :128] = -float("inf")
    infinite["q"] = args["q"].abs() + 0.1
    expected = {**infinite, "k_cache": args["k_cache"][:, :, 128:], "v_cache": args["v_cache"][:, :, 128:]}
    expected["lengths"] = args["lengths"] - 128
    assert_close(verify_attention(**infinite), verify_attention(**expected))


@pytest.mark.parametrize("position", [12345, 1_000_000, 2**31 - 1])
def test_rope_of_far_positions(variant, position):
    """cos and sin of a million radians are right to a float32 rounding."""
    inputs = Inputs("cpu")
    args = rope_case(inputs, dim=64, positions=torch.full((3, 3), position, dtype=torch.int32))
    angles = (torch.tensor(float(position)) * args["inv_freq"]).double()
    a, b = args["q"].double().chunk(2, dim=-1)
    expected = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)
    rope_append(**args)
    torch.testing.assert_close(args["q"], expected.float(), atol=2e-6, rtol=0)


def test_swiglu_is_accurate(variant):
    """Within 4 units in the last place over the range where the result is a normal number."""
    gate = torch.linspace(-80, 80, 40001)[None]
    up = torch.ones_like(gate)
    exact = gate.double() / (1 + (-gate.double()).exp())
    error = (swiglu(gate, up).double() - exact).abs() / exact.abs().clamp_min(1e-30)
    assert error[gate.abs() > 0].max() < 4 * 2**-23


@pytest.mark.parametrize("layout", ["contiguous", "one step of a window", "apart"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_stack_equals_its_composition(variant, dtype, seed, layout):
    """Bit for bit, whatever the layout of `hidden`: in place where its rows are evenly spaced, else over a copy."""
    window = 1 if layout == "one step of a window" else 1 + 2 * seed
    ops = SimpleNamespace(**cpu.OPS)
    inputs = Inputs("cpu", dtype, seed)
    args = everything(inputs, window=window, num_queries=None)
    composed = copied(args)
    outer = inputs.randn(3, window + 3, args["hidden"].shape[2] + 8)
    if layout != "contiguous":
        view = outer[:, 2 : 2 + window, :-8]
        args["hidden"] = view.copy_(args["hidden"])
    untouched = outer.clone()
    compose(ops, **composed)
    decoder_stack(**args)
    for name in ("hidden", "k_cache", "v_cache"):
        assert same_bits(args[name], composed[name]), name
    if layout != "contiguous":
        untouched[:, 2 : 2 + window, :-8] = composed["hidden"]
        assert same_bits(outer, untouched)


def test_stack_allocates_once():
    args = everything(Inputs("cpu"))
    decoder_stack(**args)
    before = _cpu.workspace_bytes()
    for _ in range(3):
        decoder_stack(**args)
    assert _cpu.workspace_bytes() == before


def test_packed_layers_keep_their_memory():
    """The weights a stack was packed from stay, also when a Parameter is given other data."""
    args = everything(Inputs("cpu"), num_queries=None)
    args["layers"] = DecoderLayers(
        one._replace(q=torch.nn.Parameter(one.q.clone(), requires_grad=False)) for one in args["layers"]
    )
    first, second = copied(args), copied(args)
    decoder_stack(**first)
    for one in args["layers"]:
        one.q.data = torch.zeros_like(one.q)
    decoder_stack(**second)
    assert same_bits(first["hidden"], second["hidden"])
