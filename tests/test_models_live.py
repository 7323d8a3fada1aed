"""`from_transformers`: the weights of a live model, shared and untouched."""

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

from layerskip_kernels.models import from_transformers
from layerskip_kernels.models.weights import layer_tensors


def resident_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_shares_every_tensor(family):
    model = tiny_models.tiny_model(family, torch.bfloat16)
    loaded = from_transformers(model)
    weights, parameters = loaded.weights, dict(model.named_parameters(remove_duplicate=False))
    assert weights.embedding.data_ptr() == parameters.pop("model.embed_tokens.weight").data_ptr()
    assert weights.lm_head.data_ptr() == parameters.pop("lm_head.weight").data_ptr()
    assert weights.final_norm.data_ptr() == parameters.pop("model.norm.weight").data_ptr()
    for index, layer in enumerate(weights.layers):
        for field, (name, _) in layer_tensors(loaded.config).items():
            parameter = parameters.pop(f"model.layers.{index}.{name}")
            assert getattr(layer, field).data_ptr() == parameter.data_ptr(), name
            assert not getattr(layer, field).requires_grad
    assert not parameters
    assert (weights.lm_head is weights.embedding) == model.config.tie_word_embeddings
    assert loaded.config.dtype == torch.bfloat16 and loaded.tokenizer is None and loaded.path is None


def test_takes_no_memory():
    from_transformers(tiny_models.tiny_model("llama2"))
    model = tiny_models.tiny_model("llama2", intermediate_size=40_000)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    before = resident_memory()
    loaded = from_transformers(model)
    assert size > 100e6 and resident_memory() - before < size / 10
    assert loaded.config.intermediate_size == 40_000


def test_model_is_left_as_it_was():
    model = tiny_models.tiny_model("qwen3").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, generation_config = copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict()
    from_transformers(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation_config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_later_changes_of_the_model_are_seen():
    model = tiny_models.tiny_model("smollm2")
    loaded = from_transformers(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3.0)
    assert (loaded.weights.layers[1].up == 3.0).all()


def test_compiled_model():
    model = tiny_models.tiny_model("smollm2")
    loaded = from_transformers(torch.compile(model))
    assert loaded.weights.embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_head_untied_by_hand():
    model = tiny_models.tiny_model("smollm2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    loaded = from_transformers(model)
    assert not loaded.config.tie_word_embeddings
    assert loaded.weights.lm_head.data_ptr() == model.lm_head.weight.data_ptr()


def test_end_of_sequence_ids_of_the_generation_config():
    model = tiny_models.tiny_model("llama2")
    model.generation_config.eos_token_id = [2, 30]
    assert from_transformers(model).config.eos_token_ids == (2, 30)


def test_resized_embeddings():
    model = tiny_models.tiny_model("smollm2")
    model.resize_token_embeddings(300, mean_resizing=False)
    loaded = from_transformers(model)
    assert loaded.config.vocab_size == 300 and loaded.weights.lm_head.shape == (300, 48)


class LoraLinear(torch.nn.Module):
    """The parameter names that an adapter wrapped around a linear layer gives."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base.in_features, 2, bias=False)})


def with_adapter(model):
    model.model.layers[0].self_attn.q_proj = LoraLinear(model.model.layers[0].self_attn.q_proj)


def on_meta(model):
    model.to("meta")


def partly_on_meta(model):
    model.model.norm.to("meta")


def quantized(model):
    model.hf_quantizer = object()


def mixed(model):
    model.model.norm.to(torch.float64)


def transposed(model):
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T


def subclassed(model):
    class Wrapped(torch.Tensor):
        pass

    layer = model.model.layers[0].mlp.gate_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Wrapped))


def resized_alone(model):
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(64, 100, bias=False)


def with_bias(model):
    model.lm_head = torch.nn.Linear(64, tiny_models.VOCAB_SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter, r"adapters that are not merged into its weights: use model\.merge_and_unload\(\) first"),
        (on_meta, "model.embed_tokens.weight is on the meta device"),
        (partly_on_meta, "model.norm.weight is on the meta device"),
        (quantized, "the model is quantized, which is not supported"),
        (mixed, r"model\.norm\.weight is torch\.float64 but .* is torch\.float32: use model\.to\(torch\.float32\)"),
        (transposed, r"model\.layers\.2\.mlp\.up_proj\.weight is not contiguous"),
        (subclassed, r"model\.layers\.0\.mlp\.gate_proj\.weight is a Wrapped, only models with plain tensors"),
        (resized_alone, r"gate_proj\.weight in the model has shape \[100, 64\], the configuration says \[112, 64\]"),
        (with_bias, r"the model has a tensor lm_head\.bias, which its configuration does not describe"),
        (lambda model: model.to(torch.float64), "dtype=torch.float64 is not supported, choose float32"),
    ],
)
def test_refused(change, message):
    model = tiny_models.tiny_model("llama2")
    change(model)
    with pytest.raises(ValueError, match=message):
        from_transformers(model)


@pytest.mark.parametrize(
    "model",
    [
        "facebook/layerskip-llama2-7B",
        torch.nn.Linear(2, 2),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=10)),
        transformers.LlamaModel(tiny_models.tiny_config("llama2")),
    ],
    ids=lambda model: type(model).__name__,
)
def test_not_a_supported_model(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}, supported are transformers' Llama"):
        from_transformers(model)
