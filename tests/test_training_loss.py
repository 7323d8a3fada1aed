import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch.nn.functional import cross_entropy

from layerskip_kernels.training import early_exit_loss
from layerskip_kernels.training.parts import model_parts


def batch(rows=3, columns=7):
    ids = torch.randint(3, VOCAB_SIZE, (rows, columns), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    return dict(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))


def exits_by_hand(model, inputs):
    """Cross entropy of every exit, from transformers' own hidden states."""
    states = model(inputs["input_ids"], output_hidden_states=True, use_cache=False).hidden_states
    normed = [*(model.model.norm(h) for h in states[1:-1]), states[-1]]
    targets = inputs["labels"][:, 1:].flatten()
    return [cross_entropy(model.lm_head(h)[:, :-1].flatten(0, 1), targets) for h in normed]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family):
    model, inputs = tiny_model(family), batch()
    output = early_exit_loss(model, inputs, layers=(1, 2, 3), e_scale=0.5)
    losses = exits_by_hand(model, inputs)
    assert output.layers == (1, 2, 3)
    torch.testing.assert_close(output.exit_losses, torch.stack(losses[1:]).detach())
    # e = 0.5, 1.5, 3 + 0.5 · 3
    expected = (0.5 * losses[1] + 1.5 * losses[2] + 4.5 * losses[3]) / 6.5
    torch.testing.assert_close(output.loss, expected)
    parameters = list(model.parameters())
    for actual, wanted in zip(torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


def test_last_layer_alone_is_the_models_own_loss():
    model, inputs = tiny_model("llama3"), batch()
    own = model(**inputs).loss
    output = early_exit_loss(model, inputs, layers=(3,), e_scale=1.0)
    assert output.layers == (3,)
    torch.testing.assert_close(output.loss, own)
    shifted = dict(input_ids=inputs["input_ids"], shift_labels=inputs["labels"].roll(-1, 1))
    shifted["shift_labels"][:, -1] = -100
    torch.testing.assert_close(early_exit_loss(model, shifted, layers=(3,), e_scale=1.0).loss, own)


def test_layers_without_weight_are_not_computed():
    model, inputs = tiny_model("llama2"), batch()
    assert early_exit_loss(model, inputs, layers=(0, 2), e_scale=0.5).layers == (2,)
    assert early_exit_loss(model, inputs, layers=(0,), e_scale=0.5).layers == (3,)


def test_only_enabled_exits_get_a_gradient():
    model, inputs = tiny_model("llama2"), batch()
    early_exit_loss(model, inputs, layers=(1,), e_scale=0.5).loss.backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad.any()
    assert model.model.layers[2].mlp.down_proj.weight.grad is None


def test_distillation_pulls_the_exits_to_the_last_layer():
    model, inputs = tiny_model("llama2"), batch()
    plain = early_exit_loss(model, inputs, layers=(1,), e_scale=0.5)
    output = early_exit_loss(model, inputs, layers=(1,), e_scale=0.5, distill_weight=2.0, distill_temperature=1.5)
    assert output.layers == (1, 3)
    torch.testing.assert_close(output.exit_losses[:1], plain.exit_losses)
    hard = early_exit_loss(model, inputs, layers=(1, 3), e_scale=0.5)
    states = model(inputs["input_ids"], output_hidden_states=True).hidden_states
    counted = inputs["labels"][:, 1:] != -100
    student, teacher = (
        (model.lm_head(h)[:, :-1][counted] / 1.5).log_softmax(-1) for h in (model.model.norm(states[2]), states[4])
    )
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    torch.testing.assert_close(output.loss, hard.loss + 0.5 / 5.0 * 2.0 * 1.5**2 * divergence)


def test_model_is_left_as_it_was():
    model, inputs = tiny_model("qwen2"), batch()
    before = model(**inputs).logits
    early_exit_loss(model, inputs, layers=(1, 2), e_scale=0.5)
    assert torch.equal(model(**inputs).logits, before)
    assert not any(m._forward_hooks for m in (*model.model.layers, model.model.norm))
    with pytest.raises(IndexError):
        early_exit_loss(model, {**inputs, "input_ids": inputs["input_ids"] + VOCAB_SIZE}, layers=(1,), e_scale=1.0)
    assert not any(m._forward_hooks for m in (*model.model.layers, model.model.norm))


def test_checkpointing_and_wrappers():
    model, inputs = tiny_model("llama2").train(), batch()
    expected = early_exit_loss(model, inputs, layers=(1, 3), e_scale=0.5)
    compiled = torch.compile(model, backend="eager")
    assert model_parts(compiled) == model_parts(model)
    model.activation_checkpointing_enable()
    output = early_exit_loss(model, inputs, layers=(1, 3), e_scale=0.5)
    torch.testing.assert_close(output.loss, expected.loss)
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(o.loss, weight)[0] for o in (output, expected)))


def test_training_lowers_the_loss_of_every_exit():
    model, inputs = tiny_model("smollm2").train(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first, layers = None, (1, 2, 3)
    for _ in range(8):
        output = early_exit_loss(model, inputs, layers=layers, e_scale=1.0)
        first = output.exit_losses if first is None else first
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert (output.exit_losses < 0.7 * first).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layers=(1, 4)), r"layers: 4 is not a layer of the model, choose 0\.\.3$"),
        (dict(e_scale=-0.1), "e_scale=-0.1: must be >= 0$"),
        (dict(inputs=dict(input_ids=torch.ones(1, 2, dtype=torch.int64))), "inputs: no labels, expected"),
    ],
)
def test_bad_values(changes, message):
    arguments = dict(inputs=batch(), layers=(1,), e_scale=0.5) | changes
    with pytest.raises(ValueError, match="^" + message):
        early_exit_loss(tiny_model("llama2"), **arguments)


def test_a_head_that_is_not_a_plain_matrix_is_refused():
    model = tiny_model("llama2")
    model.lm_head = torch.nn.Linear(64, VOCAB_SIZE, bias=True)
    with pytest.raises(ValueError, match=r"^lm_head is a Linear: the exits share a plain torch.nn.Linear without bias"):
        early_exit_loss(model, batch(), layers=(1,), e_scale=0.5)
