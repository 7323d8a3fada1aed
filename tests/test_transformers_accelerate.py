"""`lk.accelerate`, and the decoders that are kept for live models."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import GenerationConfig, TextIteratorStreamer

import layerskip_kernels as lk
from layerskip_kernels.integrations import transformers_accelerate
from layerskip_kernels.integrations.decoders import decoder_for
from layerskip_kernels.integrations.transformers_accelerate import exit_of_copy

IDS = torch.tensor([[1, 9, 17, 3, 250, 11, 40]])
OPTIONS = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def model():
    return tiny_model("smollm2", late_scale=0.1)


@pytest.fixture
def runs(monkeypatch):
    """(exit layer, speculations) of each run of our decoder."""
    seen = []
    original = lk.SelfSpeculativeDecoder.run

    def spy(self, requests, **options):
        seen.append((options["exit_layer"], options["num_speculations"]))
        return original(self, requests, **options)

    monkeypatch.setattr(lk.SelfSpeculativeDecoder, "run", spy)
    return seen


def truncated(model, layers):
    """The model cards' recipe."""
    assistant = copy.deepcopy(model)
    assistant.model.layers = assistant.model.layers[:layers]
    return assistant


def test_existing_code_runs_on_ours(model, runs):
    expected = model.generate(IDS, **OPTIONS)
    before = model.config.to_dict(), model.generation_config.to_dict(), model.generate
    assistant = truncated(model, 2)
    with lk.accelerate(model, num_speculations=3):
        assert torch.equal(model.generate(IDS, **OPTIONS), expected)
        assert torch.equal(model.generate(IDS, GenerationConfig(**OPTIONS), None), expected)
        assert torch.equal(model.generate(inputs=IDS, assistant_early_exit=3, **OPTIONS), expected)
        assert torch.equal(
            model.generate(input_ids=IDS, assistant_early_exit=1, num_assistant_tokens=5, **OPTIONS), expected
        )
        assert torch.equal(model.generate(IDS, assistant_model=assistant, **OPTIONS), expected)
        assert torch.equal(model.generate(IDS, exit_layer=2, num_speculations=6, **OPTIONS), expected)
        assert torch.equal(model.generate(IDS, custom_generate=lk.generate, exit_layer=1, **OPTIONS), expected)
    assert runs == [(None, 3), (None, 3), (3, 3), (1, 5), (2, 3), (2, 6), (1, None)]
    assert torch.equal(model.generate(IDS, **OPTIONS), expected) and len(runs) == 7
    assert (model.config.to_dict(), model.generation_config.to_dict(), model.generate) == before
    assert "generate" not in vars(model)


def test_streamers_and_stop_strings(model):
    tokenizer = tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with lk.accelerate(model):
        result = model.generate(IDS, streamer=streamer, tokenizer=tokenizer, stop_strings="never in it", **OPTIONS)
    assert "".join(streamer) == tokenizer.decode(result[0, 7:])


def test_what_we_refuse_runs_on_transformers(model, runs, caplog):
    calls = (dict(num_beams=2), dict(assistant_model=tiny_model("smollm2", seed=5)))
    expected = [model.generate(IDS, **OPTIONS, **call) for call in calls]
    transformers_accelerate._warned.clear()
    with lk.accelerate(model):
        for call, wants in zip(calls, expected):
            for _ in range(2):
                assert torch.equal(model.generate(IDS, **OPTIONS, **call), wants)
    assert runs == [] and [record.message for record in caplog.records if record.name == "layerskip_kernels"] == [
        "num_beams=2: beam search is not supported, choose 1: transformers' own generate runs instead",
        "assistant_model: not a copy of the model without its last layers: transformers' own generate runs instead",
    ]


def test_errors_are_raised(model):
    with pytest.raises(ValueError, match=r"exit_layer=9: the model has 4 layers, choose 1\.\.3"):
        lk.accelerate(model, exit_layer=9)
    with pytest.raises(TypeError, match="model is a Linear"):
        lk.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a str"):
        lk.generate("model", IDS)
    assert "generate" not in vars(model)
    with lk.accelerate(model), pytest.raises(ValueError, match="exit_layer=7: the model has 4 layers"):
        model.generate(IDS, assistant_early_exit=7, **OPTIONS)


def test_undo_of_several(model):
    first = lk.accelerate(model, exit_layer=1)
    second = lk.accelerate(model, exit_layer=2)
    second.undo()
    second.undo()
    assert vars(model)["generate"] is first._method
    first.undo()
    assert "generate" not in vars(model)


def test_copies_of_an_accelerated_model(model, runs):
    lk.accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1)
    assert not torch.equal(twin.generate(IDS, **OPTIONS), model.generate(IDS, **OPTIONS)) and len(runs) == 2
    stored = pickle.loads(pickle.dumps(model))
    assert torch.equal(stored.generate(IDS, **OPTIONS), model.generate(IDS, **OPTIONS)) and len(runs) == 3


def test_which_assistants_are_copies(model):
    assert [exit_of_copy(model, truncated(model, n)) for n in (1, 3, 4)] == [1, 3, None]
    changed = truncated(model, 2)
    assert exit_of_copy(model, changed) == 2
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert exit_of_copy(model, changed) is None
    other_rope = truncated(model, 2)
    other_rope.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert exit_of_copy(model, other_rope) is None
    assert exit_of_copy(model, tiny_model("llama3", num_hidden_layers=2)) is None


def test_a_decoder_is_kept_as_long_as_its_weights(model):
    first = decoder_for(model)
    assert decoder_for(model) is first
    assert decoder_for(model, "reference") is not first and decoder_for(model) is first
    expected = lk.generate(model, IDS, **OPTIONS)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    assert not torch.equal(lk.generate(model, IDS, **OPTIONS), expected)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    assert torch.equal(lk.generate(model, IDS, **OPTIONS), expected)
    model.bfloat16()
    assert decoder_for(model).dtype == torch.bfloat16
    model.float()
    replaced = decoder_for(model)
    weight = model.model.layers[2].mlp.up_proj.weight
    model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().clone())
    assert decoder_for(model) is not replaced
    model.config.layerskip = {"exit_layer": 3, "num_speculations": 2}
    assert decoder_for(model).exit_layer == 3


def test_a_decoder_goes_with_its_model():
    model = tiny_model("smollm2")
    lk.generate(model, IDS, **OPTIONS)
    alive, decoder = weakref.ref(model), weakref.ref(decoder_for(model))
    gc.disable()
    try:
        del model
        assert alive() is None and decoder() is None
    finally:
        gc.enable()
