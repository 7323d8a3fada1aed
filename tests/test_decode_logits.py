"""`output_logits`: the raw logits of every emitted token, the same bits whatever was drafted."""

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

import layerskip_kernels as lk

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05)


@pytest.fixture(params=["reference", "cpu"])
def decoder(model, request):
    return lk.SelfSpeculativeDecoder.from_model(
        model, exit_layer=3, num_speculations=4, max_batch_size=2, tokenizer=tiny_tokenizer(), backend=request.param
    )


def test_equal_those_of_a_forward_pass(model, decoder):
    result = decoder.generate(PROMPTS, max_new_tokens=12, output_logits=True, eos_token_id=[])
    for prompt, tokens, logits in zip(PROMPTS, result.sequences, result.logits):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.dtype == torch.float32 and logits.shape == (12, 262)
        assert logits.argmax(-1).tolist() == tokens
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [{}, dict(sample=True, temperature=1.5, top_k=20, seed=3)])
def test_same_bits_for_every_strategy(decoder, sampling):
    options = dict(max_new_tokens=12, output_logits=True, eos_token_id=[], **sampling)
    plain = decoder.generate(PROMPTS, generation_strategy="autoregressive", **options)
    assert decoder.generate(PROMPTS, **{**options, "output_logits": False}).sequences == plain.sequences
    for drafts in (1, 4):
        result = decoder.generate(PROMPTS, num_speculations=drafts, **options)
        assert result.sequences == plain.sequences
        if decoder.ops.backends["exit_head"] == "reference":
            continue  # torch's products, on which nothing is promised
        assert all(torch.equal(a, b) for a, b in zip(result.logits, plain.logits))


def test_as_many_as_tokens_however_it_ends(decoder):
    assert decoder.generate([1], max_new_tokens=2).logits is None
    full = decoder.generate("ab", max_new_tokens=12, eos_token_id=[], output_logits=True)
    eos = full.sequences[0][5]
    stop = decoder.tokenizer.decode(full.sequences[0])[3:5]
    for options in (dict(eos_token_id=eos), dict(eos_token_id=[], stop_strings=stop)):
        result = decoder.generate("ab", max_new_tokens=12, output_logits=True, **options)
        kept = len(result.sequences[0])
        assert 0 < kept < 12 and result.logits[0].shape == (kept, 262)
        torch.testing.assert_close(result.logits[0], full.logits[0][:kept])
