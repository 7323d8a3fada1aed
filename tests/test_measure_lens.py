"""What a model would say after each of its layers, against transformers' own hidden states."""

import pytest
import torch
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.measure import lens

TEXT = [*range(10, 50), *range(90, 60, -1)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama2", late_scale=0.2, num_hidden_layers=6)


@pytest.fixture(scope="module")
def decoder(model):
    return lk.SelfSpeculativeDecoder.from_model(model)


@torch.inference_mode()
def expected(model, ids):
    """Logits [L, N, V] of every exit by transformers."""
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
    normed = [*(model.model.norm(state) for state in states[:-1]), states[-1]]
    return torch.stack([model.lm_head(state)[0] for state in normed])[:, :-1]


@pytest.mark.parametrize("split", [len(TEXT), 40, 4])  # all prompt; a long prompt; a short one and several windows
def test_lens_is_every_layers_head(model, decoder, split):
    found = lens.read(decoder, TEXT[:split], TEXT[split:])
    first = 0 if split == len(TEXT) else split - 1
    logp = expected(model, TEXT).log_softmax(-1)[:, first:]
    assert found.text.tolist() == TEXT[first + 1 :]
    assert torch.equal(found.tokens, logp.argmax(-1))
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), atol=1e-4, rtol=1e-4)
    truth = logp.gather(2, found.text.expand(6, -1)[..., None])[..., 0]
    torch.testing.assert_close(found.logprob, truth, atol=1e-3, rtol=1e-4)


def test_first_stable_layer_by_hand():
    tokens = torch.tensor([[7, 7, 1, 5], [2, 7, 7, 5], [7, 2, 7, 5], [7, 7, 7, 5]])
    found = lens.Lens(tokens[-1], tokens, torch.zeros(4, 4), torch.zeros(4, 4))
    assert found.first_stable_layer().tolist() == [3, 4, 2, 1]
    assert found.drafts()[0] == [True, True, False, True]


def test_layer_reports(model, decoder):
    rows = [[*range(10, 40)], [*range(60, 81)], [5]]
    reports = lens.layer_reports(lens.read_all(decoder, rows))
    assert [r.layer for r in reports] == [1, 2, 3, 4, 5, 6]
    assert reports[-1].agreement == 1.0 and reports[0].agreement < 1.0
    losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows[:2]]
    assert reports[-1].loss == pytest.approx((29 * losses[0] + 20 * losses[1]) / 49, rel=1e-5)
    with pytest.raises(ValueError, match="there is no text of two tokens or more"):
        lens.layer_reports([])
