import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

from layerskip_kernels.training import LayerDropout


def batch(rows, columns=6, seed=0):
    return torch.randint(3, VOCAB_SIZE, (rows, columns), generator=torch.Generator().manual_seed(seed))


def kept_rows(dropout, rows):
    """Per layer: which samples the next forward pass will run, drawn the way the pass does."""
    state = dropout._generator.get_state()
    kept = [torch.rand(rows, generator=dropout._generator) >= dropout.rate(i) for i in range(1, len(dropout.layers))]
    dropout._generator.set_state(state)
    return [torch.ones(rows, dtype=torch.bool), *kept]


def by_hand(model, ids, kept, mask=None):
    """Each sample alone through the layers that it does not skip."""
    logits = []
    for row in range(len(ids)):
        skipped = [layer for layer, keep in zip(model.model.layers, kept) if not keep[row]]
        handles = [layer.register_forward_hook(lambda module, args, output: args[0].clone()) for layer in skipped]
        row_mask = None if mask is None else mask[row : row + 1]
        logits.append(model(ids[row : row + 1], attention_mask=row_mask, use_cache=False).logits)
        for handle in handles:
            handle.remove()
    return torch.cat(logits)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_sample_keeps_its_hidden_state(family, checkpointing):
    model, ids = tiny_model(family).train(), batch(5)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[4, :1] = 0
    if checkpointing:
        model.activation_checkpointing_enable()
    with LayerDropout(model, 0.9, seed=3) as dropout:
        kept = kept_rows(dropout, 5)
        assert any(0 < k.sum() < 5 for k in kept)
        actual = model(ids, attention_mask=mask, use_cache=False).logits
        gradient = torch.autograd.grad(actual[mask.bool()].square().mean(), model.model.embed_tokens.weight)[0]
    expected = by_hand(model, ids, kept, mask)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=1e-4)
    wanted = torch.autograd.grad(expected[mask.bool()].square().mean(), model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(gradient, wanted, atol=2e-4, rtol=1e-3)


def test_dropped_samples_cost_nothing():
    model, ids = tiny_model("llama2").train(), batch(8)
    seen = [[] for _ in model.model.layers]
    for layer, rows in zip(model.model.layers, seen):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
    with LayerDropout(model, 0.8, seed=1) as dropout:
        kept = [int(k.sum()) for k in kept_rows(dropout, 8)]
        model(ids, use_cache=False)
    assert [rows[0] if rows else 0 for rows in seen] == kept and sum(kept) < 32


def test_a_layer_that_drops_every_sample_does_not_run():
    model, ids = tiny_model("llama2").train(), batch(3)
    calls = []
    model.model.layers[-1].self_attn.register_forward_hook(lambda *a: calls.append(1))
    with LayerDropout(model, 1.0):
        model(ids, use_cache=False).logits.sum().backward()
    assert not calls and model.model.layers[-1].self_attn.q_proj.weight.grad is None


def test_rates_are_met():
    """16000 draws per layer: within 4 standard deviations of the rate."""
    model, rows, passes = tiny_model("llama2").train(), 400, 40
    run = torch.zeros(4)
    for layer, module in enumerate(model.model.layers):
        module.mlp.register_forward_hook(lambda m, args, out, layer=layer: run[layer].add_(len(args[0])))
    with LayerDropout(model, 0.5, seed=7) as dropout, torch.no_grad():
        for step in range(passes):
            dropout.set_step(step)
            model(batch(rows, 1), use_cache=False)
    draws = rows * passes
    for layer, rate in enumerate((0.0, 0.129960525, 0.293700526, 0.5)):  # 0.5 · (2^(l/3) - 1)
        assert abs(1 - run[layer] / draws - rate) <= 4 * (rate * (1 - rate) / draws) ** 0.5


def test_draws_depend_on_seed_rank_and_step_alone():
    model, ids = tiny_model("llama2").train(), batch(16)

    def logits(step=0, **options):
        with LayerDropout(model, 0.7, **options) as dropout, torch.no_grad():
            dropout.set_step(step)
            return [model(ids, use_cache=False).logits for _ in range(2)]

    first, second = logits(seed=5)
    torch.manual_seed(123)  # the global generator has no part in it
    assert all(torch.equal(a, b) for a, b in zip(logits(seed=5), (first, second)))
    assert not torch.equal(first, second)  # micro-batches of one step differ
    for other in (dict(seed=6), dict(seed=5, rank=1), dict(seed=5, step=1)):
        assert not torch.equal(logits(**other)[0], first)


def test_nothing_is_dropped_in_eval_mode_or_left_behind():
    model, ids = tiny_model("llama2"), batch(4)
    before = model(ids).logits
    keys = [set(vars(layer)) for layer in model.model.layers]
    with LayerDropout(model, 1.0):
        assert torch.equal(model(ids).logits, before)
        model.train()
        assert not torch.equal(model(ids, use_cache=False).logits, before)
        model.eval()
    assert [set(vars(layer)) for layer in model.model.layers] == keys
    with pytest.raises(KeyError), LayerDropout(model, 1.0):
        raise KeyError
    assert [set(vars(layer)) for layer in model.model.layers] == keys
    assert torch.equal(model.train()(ids).logits, before)


def test_a_forward_of_the_instance_is_given_back():
    model = tiny_model("llama2")
    layer = model.model.layers[1]
    layer.forward = own = layer.forward
    with LayerDropout(model, 0.5):
        assert layer.forward is not own
    assert vars(layer)["forward"] is own


def test_refuses_what_it_cannot_do():
    model, ids = tiny_model("llama2").train(), batch(2)
    with LayerDropout(model, 0.5) as dropout:
        with pytest.raises(ValueError, match=r"^use_cache=True: .* pass use_cache=False$"):
            model(ids, use_cache=True)
        with pytest.raises(RuntimeError, match=r"^layer dropout is already attached$"):
            dropout.attach()
    with pytest.raises(ValueError, match=r"^model_type='gpt2' is not supported"):
        from transformers import GPT2Config, GPT2LMHeadModel

        LayerDropout(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=1, vocab_size=9)), 0.5)
