import pytest
import torch
import torch.nn.functional as F
from op_inputs import (
    DEFECTS,
    FLOATS,
    Guarded,
    Inputs,
    assert_rejects,
    assert_rejects_tensor,
    bad_tensors,
    clone,
    defective,
    dtype_name,
    num_threads,
    reference,
    same_bits,
    strided,
)
from tolerances import assert_close
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen3Config,
    Qwen3Model,
)

from layerskip_kernels import registry
from layerskip_kernels.ops import DecoderLayers, LayerWeights, decoder_stack
from layerskip_kernels.reference.decoder_stack import compose

OP = "decoder_stack"
EPS = 1e-5
WIDTH, MLP, HEADS, GROUPS, DIM = 72, 104, 6, 2, 16
KINDS = {
    "plain": {},
    "biases": dict(biases=True),
    "norms": dict(norms=True),
    "sliding": dict(sliding_window=4),
    "no rope": dict(use_rope=False),
}


def layer(inputs, *, biases=False, norms=False, **settings):
    rows = dict(q=HEADS * DIM, k=GROUPS * DIM, v=GROUPS * DIM, o=WIDTH, gate=MLP, up=MLP, down=WIDTH)
    columns = dict(o=HEADS * DIM, down=MLP)
    tensors = {n: inputs.weight(count, columns.get(n, WIDTH)) for n, count in rows.items()}
    if biases:
        tensors |= {f"{n}_bias": inputs.randn(count, scale=0.3) for n, count in rows.items()}
    if norms:
        tensors |= dict(q_norm=inputs.norm(DIM), k_norm=inputs.norm(DIM))
    return LayerWeights(attn_norm=inputs.norm(WIDTH), mlp_norm=inputs.norm(WIDTH), **tensors, **settings)


def case(inputs, *, kinds=("plain", "plain"), window=3, lengths=(5, 0, 17), num_slots=5, capacity=32, **more):
    """Arguments with a random past in the caches and NaN behind it."""
    layers = DecoderLayers(layer(inputs, **KINDS[kind]) for kind in kinds)
    caches = [inputs.randn(len(layers), num_slots, GROUPS, capacity, DIM) for _ in range(2)]
    slot_ids = more.get("slot_ids")
    for b, length in enumerate(lengths):
        for cache in caches:
            cache[:, b if slot_ids is None else int(slot_ids[b]), :, length:] = float("nan")
    past = inputs.int32(*lengths)
    return (
        dict(
            hidden=inputs.randn(len(lengths), window, WIDTH),
            layers=layers,
            k_cache=caches[0],
            v_cache=caches[1],
            eps=EPS,
            scale=DIM**-0.5,
            lengths=past,
            positions=past[:, None] + torch.arange(window, dtype=torch.int32, device=inputs.device),
            inv_freq=(10000.0 ** (-torch.arange(0, DIM, 2) / DIM)).to(inputs.device),
        )
        | more
    )


def copied(args):
    return clone({n: v for n, v in args.items() if n != "layers"}) | dict(layers=args["layers"])


def real_rows(hidden, num_queries):
    """The rows of the window that mean anything."""
    if num_queries is None:
        return hidden.flatten(0, 1)
    return torch.cat([rows[:n] for rows, n in zip(hidden, num_queries.tolist(), strict=True)])


def assert_equals_reference(args):
    """Against the reference's composition; what must not change did not."""
    expected = {n: v.cpu().clone() if isinstance(v, torch.Tensor) else v for n, v in args.items()}
    expected["layers"] = DecoderLayers(
        LayerWeights(*(v.cpu() if isinstance(v, torch.Tensor) else v for v in one)) for one in args["layers"]
    )
    before = copied(args)
    _, _, expected = reference(decoder_stack, **expected)
    assert decoder_stack(**args) is None
    num_queries = args.get("num_queries")
    rows = real_rows(args["hidden"], num_queries)
    assert rows.isfinite().all()
    assert_close(rows, real_rows(expected["hidden"], num_queries), OP)
    for name in ("k_cache", "v_cache"):
        assert_close(args[name], expected[name], OP)
        assert torch.equal(args[name].isnan().cpu(), expected[name].isnan())
    for name in ("lengths", "positions", "inv_freq"):
        assert torch.equal(args[name], before[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_each_kind_of_layer(backend, dtype, kind):
    assert_equals_reference(case(Inputs(backend.device, dtype), kinds=(kind, kind)))


def everything(inputs, **more):
    """All kinds of layers in one stack, ragged windows in permuted slots."""
    settings = dict(slot_ids=inputs.int32(3, 0, 2), num_queries=inputs.int32(2, 5, 0), window=5, attention_factor=1.1)
    return case(inputs, kinds=tuple(KINDS), **{**settings, **more})


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_everything_at_once(backend, dtype):
    inputs = Inputs(backend.device, dtype)
    assert_equals_reference(everything(inputs))
    assert_equals_reference(everything(inputs, inv_freq=inputs.uniform(3, 5, DIM // 2)))


def test_views_and_canaries(backend):
    args = everything(Inputs(backend.device))
    guarded = {n: Guarded.of(args[n]) for n in ("hidden", "k_cache", "v_cache")}
    args["layers"] = DecoderLayers(
        one._replace(q=strided(one.q), gate=strided(one.gate), down=strided(one.down)) for one in args["layers"]
    )
    assert_equals_reference({**args, **{n: g.view for n, g in guarded.items()}})
    for guard in guarded.values():
        guard.assert_surroundings_unchanged()


# Against transformers

TINY = dict(
    vocab_size=50,
    hidden_size=WIDTH,
    intermediate_size=MLP,
    num_hidden_layers=3,
    num_attention_heads=HEADS,
    num_key_value_heads=GROUPS,
    head_dim=DIM,
    rms_norm_eps=EPS,
    attn_implementation="eager",
)
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**TINY)),
    "llama with biases": lambda: LlamaModel(LlamaConfig(**TINY, attention_bias=True, mlp_bias=True)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**TINY)),
    "mistral": lambda: MistralModel(MistralConfig(**TINY, sliding_window=6)),
}


def layers_of(model):
    def weights(one):
        attention, mlp = one.self_attn, one.mlp
        linears = dict(q=attention.q_proj, k=attention.k_proj, v=attention.v_proj, o=attention.o_proj)
        linears |= dict(gate=mlp.gate_proj, up=mlp.up_proj, down=mlp.down_proj)
        tensors = {n: linear.weight for n, linear in linears.items()}
        tensors |= {f"{n}_bias": linear.bias for n, linear in linears.items()}
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                tensors[name] = getattr(attention, name).weight
        window = getattr(attention, "sliding_window", None) or getattr(model.config, "sliding_window", None)
        tensors |= dict(attn_norm=one.input_layernorm.weight, mlp_norm=one.post_attention_layernorm.weight)
        return LayerWeights(**{n: t if t is None else t.detach() for n, t in tensors.items()}, sliding_window=window)

    return DecoderLayers(weights(one) for one in model.layers)


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(backend, name):
    """A prompt in windows of different sizes gives the hidden states of transformers' whole forward pass."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(backend.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = torch.randint(0, 50, (2, 19), device=backend.device)
        expected = model(ids).last_hidden_state
        embedded = model.embed_tokens(ids)
    caches = [torch.full((3, 2, GROUPS, 19, DIM), float("nan"), device=backend.device) for _ in range(2)]
    parts, start = [], 0
    for window in (9, 1, 7, 2):
        part = embedded[:, start : start + window].contiguous()
        past = torch.full((2,), start, dtype=torch.int32, device=backend.device)
        positions = past[:, None] + torch.arange(window, dtype=torch.int32, device=backend.device)
        common = dict(eps=EPS, scale=DIM**-0.5, lengths=past, positions=positions)
        decoder_stack(part, layers_of(model), *caches, **common, inv_freq=model.rotary_emb.inv_freq)
        parts.append(part)
        start += window
    normed = F.rms_norm(torch.cat(parts, dim=1), (WIDTH,), model.norm.weight, EPS)
    assert_close(normed, expected.detach(), OP)


# Bit for bit


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_equals_the_composition_of_its_ops_to_the_bit(kernels, dtype, window):
    inputs = Inputs(kernels.device, dtype)
    num_queries = inputs.int32(min(2, window), window, 0)
    ops = registry.bind(inputs.device, dtype, kernels.name)
    for threads in (1, 2):
        with num_threads(threads):
            for args in (
                everything(Inputs(kernels.device, dtype), window=window, num_queries=num_queries),
                case(Inputs(kernels.device, dtype), kinds=tuple(KINDS), window=window),
            ):
                composed = copied(args)
                compose(ops, **composed)
                decoder_stack(**args)
                rows = (real_rows(a["hidden"], args.get("num_queries")) for a in (args, composed))
                assert same_bits(*rows)
                assert same_bits(args["k_cache"], composed["k_cache"])
                assert same_bits(args["v_cache"], composed["v_cache"])


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_a_row_depends_on_itself_alone(kernels, dtype):
    """One window at once equals token by token, sequence by sequence, layer by layer; next to NaN; 1 or 2 threads."""
    inputs = Inputs(kernels.device, dtype)
    args = case(inputs, kinds=tuple(KINDS), window=5)
    one = copied(args)
    for b in range(3):
        for t in range(5):
            hidden = one["hidden"][b : b + 1, t : t + 1].clone()
            for i, single in enumerate(one["layers"]):
                decoder_stack(
                    hidden,
                    DecoderLayers([single]),
                    one["k_cache"][i : i + 1],
                    one["v_cache"][i : i + 1],
                    lengths=one["lengths"][b : b + 1] + t,
                    positions=one["positions"][b : b + 1, t : t + 1],
                    slot_ids=inputs.int32(b),
                    **{n: one[n] for n in ("eps", "scale", "inv_freq")},
                )
            one["hidden"][b, t] = hidden[0, 0]
    for threads in (1, 2):
        with num_threads(threads):
            whole = copied(args)
            decoder_stack(**whole)
            for name in ("hidden", "k_cache", "v_cache"):
                assert same_bits(whole[name], one[name]), name
            poisoned = copied(args)
            poisoned["hidden"][1] = float("nan")
            poisoned["hidden"][2, 3:] = float("inf")
            decoder_stack(**poisoned)
            assert same_bits(poisoned["hidden"][0], one["hidden"][0])
            assert same_bits(poisoned["hidden"][2, :3], one["hidden"][2, :3])


# Bad arguments


def arguments():
    return everything(Inputs("cpu"))


@bad_tensors(
    "hidden", "k_cache", "v_cache", "lengths", "positions", "inv_freq", "slot_ids", "num_queries", free_size=("hidden",)
)  # fmt: skip
def test_rejects_tensor(path, defect):
    assert_rejects_tensor(decoder_stack, arguments(), path, defect)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("name", LayerWeights._fields[:-2])
def test_rejects_weight(name, defect):
    inputs = Inputs("cpu")
    args = case(inputs, kinds=("plain",))
    good = layer(inputs, biases=True, norms=True)
    bad, error = defective(getattr(good, name), defect)
    args["layers"] = DecoderLayers([good._replace(**{name: bad})])
    assert_rejects(decoder_stack, args, error, rf"layers\[0\]\.{name}: ")


def one_layer(**changes):
    inputs = Inputs("cpu")
    return DecoderLayers([layer(inputs)._replace(**changes)] * len(KINDS))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(layers=[]), TypeError, "layers: expected a non-empty DecoderLayers, got list"),
        (dict(layers=DecoderLayers()), TypeError, "layers: expected a non-empty DecoderLayers"),
        (dict(layers=DecoderLayers([1] * 5)), TypeError, r"layers\[0\]: expected LayerWeights, got int"),
        (dict(layers=one_layer(sliding_window=0)), ValueError, r"layers\[0\].sliding_window=0: must be at least 1"),
        (dict(layers=one_layer(q_norm=torch.ones(DIM))), ValueError, r"layers\[0\].q_norm, .*: give both or neither"),
        (dict(layers=one_layer(q=torch.ones(40, WIDTH))), ValueError, r"layers\[0\].q: 40 rows, expected a multiple"),
        (dict(layers=one_layer()[:2]), TypeError, "layers: expected a non-empty DecoderLayers, got tuple"),
        (dict(layers=DecoderLayers(one_layer()[:2])), ValueError, r"k_cache: shape .* expected \[2, "),
        (dict(eps=0.0), ValueError, "eps=0.0: must be > 0"),
        (dict(scale=0.0), ValueError, "scale=0.0: must be > 0"),
        (dict(attention_factor=-1.0), ValueError, "attention_factor=-1.0: must be > 0"),
        (dict(k_cache=torch.ones(5, 5, 2, 32, 12), v_cache=torch.ones(5, 5, 2, 32, 12)), ValueError,
         r"D=12: choose a multiple of 8 in 8\.\.256"),
        (dict(block_table=torch.ones(3, 2)), ValueError, "block_table: paged caches are not supported"),
    ],
)  # fmt: skip
def test_rejects(change, error, message):
    assert_rejects(decoder_stack, {**arguments(), **change}, error, message)
