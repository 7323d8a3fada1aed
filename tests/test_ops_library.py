"""The ops under torch.library and torch.compile: traced calls do what direct calls do, in-place arguments included."""

import pytest
import torch
from op_inputs import Inputs, clone, same_bits, tensors

import layerskip_kernels as lk
from layerskip_kernels import ops
from layerskip_kernels.ops import DecoderLayers, ExitHead, LayerWeights, RepetitionPenalty, Sampling, Verified
from layerskip_kernels.registry import OP_NAMES

B, T, H, G, D, C, V = 2, 3, 4, 2, 8, 16, 50


def window(inputs):
    lengths = inputs.int32(2, 5)
    return dict(lengths=lengths, slot_ids=inputs.int32(3, 1), num_queries=inputs.int32(3, 2)), lengths


def positions(lengths):
    return lengths[:, None] + torch.arange(T, dtype=torch.int32)


def cache(inputs, *layers):
    return inputs.randn(*layers, 4, G, 16, D)


def layer(inputs):
    shapes = dict(q=(H * D, C), k=(G * D, C), v=(G * D, C), o=(C, H * D), gate=(24, C), up=(24, C), down=(C, 24))
    weights = {n: inputs.weight(*shape) for n, shape in shapes.items()}
    return LayerWeights(attn_norm=inputs.norm(C), mlp_norm=inputs.norm(C), **weights, q_bias=inputs.randn(H * D))


def sampling(inputs):
    temperature, ids = torch.tensor([0.0, 1.0, 0.7]), torch.arange(3)
    return Sampling(temperature, ids, ids + 5, ids, torch.tensor([0, 9, 5]), inputs.uniform(3), torch.full((3,), 0.01))


def verified():
    numbers = [torch.zeros(B, dtype=torch.int32) for _ in range(2)]
    return Verified(torch.zeros(B, T + 1, dtype=torch.int64), *numbers, torch.zeros(B, dtype=torch.bool))


def limits(inputs):
    return dict(eos_ids=torch.tensor([2]), remaining=inputs.int32(9, 2), finished=torch.tensor([False, False]))


# Per op: calls of the public function, as (args, kwargs), that cover out=, in-place and optional arguments.


def rms_norm(i):
    x, weight = i.randn(3, C), i.norm(C)
    yield (x, weight, 1e-5), {}
    yield (x, weight, 1e-5), dict(residual=i.randn(3, C), out=i.randn(3, C))


def small_linear(i):
    x, w, v, norm = i.randn(3, C), i.randn(5, C), i.randn(7, C), (i.norm(C), 1e-5)
    yield (x, w), dict(bias=i.randn(5))
    yield (x, w), dict(norm=norm, residual=i.randn(3, 5), out=i.randn(3, 5))
    yield (x, [w, v]), dict(norm=norm, bias=[None, i.randn(7)])
    yield (x, [w, v]), dict(out=[i.randn(3, 5), i.randn(3, 7)])
    yield (x, [w, w]), dict(norm=norm, bias=[None, i.randn(5)], swiglu=True)
    yield (x, [w, w]), dict(swiglu=True, out=i.randn(3, 5))


def swiglu(i):
    yield (i.randn(3, C), i.randn(3, C)), {}
    yield (i.randn(3, C), i.randn(3, C)), dict(out=i.randn(3, C))


def rope_append(i):
    where, lengths = window(i)
    arguments = i.randn(B, T, H, D), i.randn(B, T, G, D), i.randn(B, T, G, D), cache(i), cache(i)
    angles = dict(positions=positions(lengths), inv_freq=i.uniform(D // 2))
    yield arguments, dict(**where, **angles, attention_factor=1.5)
    yield arguments, dict(lengths=lengths, **angles)


def verify_attention(i):
    where, lengths = window(i)
    q, tree_mask = i.randn(B, T, H, D), torch.ones(T, T).tril().bool()
    yield (q, cache(i), cache(i)), dict(lengths=lengths, scale=0.3)
    more = dict(tree_mask=tree_mask, sliding_window=2, out=torch.zeros(B, T, H, D))
    yield (q, cache(i), cache(i)), dict(**where, scale=0.3, **more)


def exit_head(i):
    arguments = i.randn(3, C), i.norm(C), i.randn(V, C)
    yield arguments, dict(eps=1e-5)
    yield arguments, dict(eps=1e-5, bias=i.randn(V), logit_scale=2.0, softcap=5.0, sampling=sampling(i))
    out = ExitHead(torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(3))
    first_seen, position = i.ids(3, 1, V).to(torch.uint8), torch.arange(3, dtype=torch.uint8)
    repetition = RepetitionPenalty(torch.full((3,), 1.5), first_seen, position)
    yield arguments, dict(eps=1e-5, penalty=repetition, logits_out=torch.zeros(3, V), out=out)


def verify_tokens(i):
    arguments = i.ids(2, B, T), i.ids(2, B, T + 1), i.int32(3, 2)
    yield arguments, limits(i)
    yield arguments, dict(**limits(i), out=verified())


def verify_rejection(i):
    q, p = i.randn(B, T, 5).softmax(-1), i.randn(B, T + 1, 5).softmax(-1)
    arguments = i.ids(5, B, T), q, p, i.uniform(B, T + 1, 2), i.int32(3, 2)
    yield arguments, limits(i)
    yield arguments, dict(**limits(i), method="block", out=verified())


def kv_rollback(i):
    arguments = cache(i, 2), cache(i, 2), i.int32(2, 5), i.int32(1, 2)
    yield arguments, dict(window=3)
    path = torch.tensor([[2, 0, 0], [1, 2, 0]], dtype=torch.int32)
    yield arguments, dict(window=3, slot_ids=i.int32(3, 1), path=path, scrub=True)


def decoder_stack(i):
    where, lengths = window(i)
    layers = DecoderLayers([layer(i), layer(i)._replace(sliding_window=3, use_rope=False)])
    arguments = i.randn(B, T, C), layers, cache(i, 2), cache(i, 2)
    more = dict(eps=1e-5, scale=0.3, positions=positions(lengths), inv_freq=i.uniform(D // 2))
    yield arguments, dict(**where, **more)


def early_exit_cross_entropy(i):
    hiddens, head = [i.randn(4, C).requires_grad_() for _ in range(2)], i.weight(V, C).requires_grad_()
    targets = torch.tensor([3, -100, 0, 49])
    yield (hiddens, head, targets, [0.25, 0.75]), {}
    more = dict(num_items=torch.tensor(6), logit_scale=2.0, softcap=5.0, chunk_size=4, ignore_index=3)
    yield ([h.detach() for h in hiddens], head, i.ids(V, 4), [1, 2]), dict(**more, distill_weight=0.5)
    yield (hiddens, head.detach(), targets, [1, 0]), dict(num_items=7, distill_weight=1.0, distill_temperature=2.0)


CASES = [(op, number) for op in OP_NAMES for number, _ in enumerate(globals()[op](Inputs("cpu")))]
every_case = pytest.mark.parametrize(("op", "number"), CASES, ids=[f"{op}-{number}" for op, number in CASES])


@pytest.fixture(autouse=True)
def _reference():
    torch._dynamo.reset()
    with lk.use_backend("reference"):
        yield


def copied(args, kwargs):
    """A deep copy; DecoderLayers, unknown to pytree, are never written to."""
    layers = [a if isinstance(a, DecoderLayers) else clone(a) for a in args]
    return layers, clone(kwargs)


def assert_compiles(op, number, backend):
    args, kwargs = list(globals()[op](Inputs("cpu")))[number]
    function = getattr(ops, op)
    eager_args, eager_kwargs = copied(args, kwargs)
    expected = function(*eager_args, **eager_kwargs)
    compiled = torch.compile(lambda *a, **k: function(*a, **k), fullgraph=True, backend=backend)
    result = compiled(*args, **kwargs)
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        assert a.dtype == b.dtype and same_bits(a, b)
    if "out" in kwargs:
        assert all(a is b for a, b in zip(tensors(result), tensors(kwargs["out"]), strict=True))
    flat = [t for t in tensors((args, kwargs))], [t for t in tensors((eager_args, eager_kwargs))]
    for a, b in zip(*flat, strict=True):
        assert same_bits(a, b), "compiled and eager call left an argument different"
    assert type(result) is type(expected)


@every_case
def test_compiles_to_the_same(op, number):
    assert_compiles(op, number, "aot_eager")


def test_compiles_with_inductor():
    assert_compiles("rms_norm", 1, "inductor")


class Traced(Exception):
    """Carries the arguments of a call."""


def library_arguments(monkeypatch, op, args, kwargs):
    """What the public function hands to torch.ops.layerskip_kernels.<op> while it is traced."""

    def stop(*traced_args, **traced_kwargs):
        raise Traced(traced_args, traced_kwargs)

    with monkeypatch.context() as patch, pytest.raises(Traced) as call:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(torch.ops.layerskip_kernels, op, stop)
        getattr(ops, op)(*args, **kwargs)
    return call.value.args


@every_case
def test_opcheck(monkeypatch, op, number):
    """Schema, fake tensors, autograd registration and AOT dispatch."""
    args, kwargs = list(globals()[op](Inputs("cpu")))[number]
    traced_args, traced_kwargs = library_arguments(monkeypatch, op, args, kwargs)
    torch.library.opcheck(getattr(torch.ops.layerskip_kernels, op).default, traced_args, traced_kwargs)


def test_every_op_is_registered():
    assert {name for name in OP_NAMES if hasattr(torch.ops.layerskip_kernels, name)} == set(OP_NAMES)


def test_compiled_graph_breaks_on_nothing_across_ops():
    """A block of several ops, with state updated in place between them, is one graph."""
    inputs = Inputs("cpu")
    where, lengths = window(inputs)
    weights = layer(inputs)
    caches = cache(inputs), cache(inputs)
    hidden, angles = inputs.randn(B * T, C), dict(positions=positions(lengths), inv_freq=inputs.uniform(D // 2))

    def block(x, k_cache, v_cache):
        q, k, v = ops.small_linear(x, [weights.q, weights.k, weights.v], norm=(weights.attn_norm, 1e-5))
        q, k, v = (t.view(B, T, -1, D) for t in (q, k, v))
        ops.rope_append(q, k, v, k_cache, v_cache, **where, **angles)
        attended = ops.verify_attention(q, k_cache, v_cache, scale=0.3, **where)
        return ops.small_linear(attended.view(B * T, -1), weights.o, residual=x)

    eager_caches = clone(caches)
    expected = block(hidden, *eager_caches)
    result = torch.compile(block, fullgraph=True, backend="aot_eager")(hidden, *caches)
    assert same_bits(result, expected)
    assert all(same_bits(a, b) for a, b in zip(caches, eager_caches, strict=True))


@pytest.mark.parametrize("op", OP_NAMES)
def test_bad_arguments_under_compile(op):
    """The checks run while tracing too."""
    args, kwargs = next(globals()[op](Inputs("cpu")))
    bad = [t[None] for t in args[0]] if isinstance(args[0], list) else args[0][None]
    compiled = torch.compile(lambda *a, **k: getattr(ops, op)(*a, **k), backend="eager")
    with pytest.raises(ValueError, match="shape"):
        compiled(bad, *args[1:], **kwargs)
