"""Quantized weights: made while loading, or as torchao stores and holds them; a sentence for what is not supported."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, tiny_checkpoint, tiny_model
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

import layerskip_kernels as lk
from layerskip_kernels.models import from_transformers, load_checkpoint, torchao
from layerskip_kernels.models.checkpoint import Checkpoint
from layerskip_kernels.models.weights import linear_names
from layerskip_kernels.ops import QuantizedWeight, dequantize, quantize

SIZES = dict(hidden_size=128, intermediate_size=192)
PROMPT = [5, 9, 17, 3, 250, 11, 40]
CONFIGS = {
    "int8 rows": Int8WeightOnlyConfig(),
    "int8 groups": Int8WeightOnlyConfig(granularity=PerGroup(64)),
    "intx8 rows": IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
    "int4 groups": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)),
    "int4 asymmetric": IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(64), mapping_type=MappingType.ASYMMETRIC
    ),
}


def named(loaded):
    """Name -> tensor of all linears and the head."""
    layers = [getattr(layer, field) for layer in loaded.weights.layers for field in ("q", "k", "v", "o")]
    layers += [getattr(layer, field) for layer in loaded.weights.layers for field in ("gate", "up", "down")]
    return [*layers, loaded.weights.lm_head]


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "llama2"])
@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
def test_linears_and_head_are_quantized_while_loading(tmp_path, family, quantization, bits):
    folder = tiny_checkpoint(tmp_path, family, torch.bfloat16, tokenizer=False, max_shard_size="100KB")
    plain, loaded = load_checkpoint(folder), load_checkpoint(folder, quantization=quantization)
    all_bits = [bits] * 28 + [8]  # of the head always 8
    for weight, original, its_bits in zip(named(loaded), named(plain), all_bits, strict=True):
        assert isinstance(weight, QuantizedWeight) and weight.bits == its_bits and weight.group == 64
        assert torch.equal(dequantize(weight), dequantize(quantize(original, its_bits)))
    assert torch.equal(loaded.weights.embedding, plain.weights.embedding)
    assert loaded.weights.embedding.dtype == torch.bfloat16
    assert loaded.config.tie_word_embeddings == (family != "llama2")
    assert torch.equal(loaded.weights.layers[2].mlp_norm, plain.weights.layers[2].mlp_norm)
    if family == "qwen2":
        assert torch.equal(loaded.weights.layers[1].k_bias, plain.weights.layers[1].k_bias)


def test_a_head_beside_another_embedding_stays_the_head(tmp_path):
    folder = tiny_checkpoint(tmp_path, "smollm2", tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * -1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = load_checkpoint(folder, quantization="int8")
    assert torch.equal(dequantize(loaded.weights.lm_head), dequantize(quantize(head, 8)))


def test_originals_are_read_one_by_one_and_let_go(tmp_path, monkeypatch):
    """The file is mapped anew after each, so that at most one original is there; what stays is read at last."""
    folder = tiny_checkpoint(tmp_path, "llama2", tokenizer=False)
    read, events = Checkpoint.tensor, []
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name, **how: events.append(name) or read(self, name, **how))
    map_anew = Checkpoint.map_anew
    monkeypatch.setattr(Checkpoint, "map_anew", lambda self, name: events.append("anew") or map_anew(self, name))
    loaded = load_checkpoint(folder, quantization="int4")
    linears = linear_names(loaded.config)
    assert events[: 2 * len(linears)] == [event for name in linears for event in (name, "anew")]
    assert not any("proj" in event or event == "anew" for event in events[2 * len(linears) :])


def test_of_a_live_model_only_linears_are_copied():
    model = tiny_model("llama3")
    loaded = from_transformers(model, "int4")
    assert loaded.weights.quantized and not from_transformers(model).weights.quantized
    assert loaded.weights.embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(
        dequantize(loaded.weights.layers[3].down),
        dequantize(quantize(model.model.layers[3].mlp.down_proj.weight.detach(), 4)),
    )


@pytest.mark.parametrize("value", ["int2", 8, True, torch.zeros(2)])
def test_a_wrong_value(tmp_path, value):
    with pytest.raises(ValueError, match=r"quantization=.*: choose int8 or int4, or None"):
        from_transformers(tiny_model("llama3"), value)
    with pytest.raises(ValueError, match=r"quantization=.*: choose int8 or int4, or None"):
        load_checkpoint(tiny_checkpoint(tmp_path, "llama2", tokenizer=False), quantization=value)


def test_a_gpu_is_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama2", tokenizer=False)
    with pytest.raises(ValueError, match="quantization='int8': quantized weights run on the CPU alone, not on cuda"):
        load_checkpoint(folder, quantization="int8", device="cuda")


def test_damaged_weights_are_named():
    model = tiny_model("llama2")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be quantized to 4 bits: .* row 7"):
        from_transformers(model, "int4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"), "llama3", tokenizer=False, **SIZES)


def quantized_by_torchao(plain, config, **options):
    return AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=TorchAoConfig(config, **options)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_torchaos_checkpoints_say_what_they_say_in_transformers(plain, tmp_path, name):
    """Within 0.2 % of the largest logit: activations are rounded to 16 bits, all else is float32 on both sides."""
    model = quantized_by_torchao(plain, CONFIGS[name])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    stored, live = load_checkpoint(tmp_path), from_transformers(model)
    assert [type(w) for w in named(stored)] == [QuantizedWeight] * (len(named(stored)) - 1) + [torch.Tensor]
    for weight, same in zip(named(stored)[:-1], named(live)[:-1]):
        assert weight.bits == (4 if "int4" in name else 8) and weight.group == (
            64 if "groups" in name else weight.group
        )
        assert torch.equal(dequantize(weight), dequantize(same))
        assert (weight.offset is not None) == ("asymmetric" in name)
    down = model.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(dequantize(stored.weights.layers[1].down), down.dequantize())

    decoder = lk.SelfSpeculativeDecoder.from_pretrained(tmp_path, backend="reference", exit_layer=2)
    result = decoder.generate(PROMPT, max_new_tokens=12, eos_token_id=[], output_logits=True)
    with torch.no_grad():
        ids = torch.tensor([PROMPT + result.sequences[0][:-1]])
        expected = model(ids).logits[0, len(PROMPT) - 1 :]
    assert (result.logits[0] - expected).abs().max() < 0.002 * expected.abs().max()
    again = lk.SelfSpeculativeDecoder.from_model(model, backend="reference", exit_layer=2)
    assert again.generate(PROMPT, max_new_tokens=12, eos_token_id=[]).sequences == result.sequences


def test_torchaos_embedding_table_becomes_numbers_again(tmp_path):
    model = tiny_model("llama2", **SIZES)
    quantize_(model, CONFIGS["int8 rows"])  # by torchao alone, head included
    quantize_(model, CONFIGS["int4 groups"], filter_fn=lambda module, name: isinstance(module, torch.nn.Embedding))
    table = model.model.embed_tokens.weight.dequantize()
    loaded = from_transformers(model)
    torch.testing.assert_close(loaded.weights.embedding, table)
    assert loaded.weights.lm_head.bits == 8 and loaded.weights.layers[0].q.bits == 8


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "is quantized in groups of 32 columns"),
        (IntxWeightOnlyConfig(torch.int2, PerGroup(64)), "is quantized to int2"),
    ],
)
def test_other_formats_of_torchao_are_refused(plain, tmp_path, config, what):
    model = quantized_by_torchao(plain, config)
    model.save_pretrained(tmp_path)
    for load in (lambda: load_checkpoint(tmp_path), lambda: from_transformers(model)):
        with pytest.raises(ValueError) as error:
            load()
        message = str(error.value)
        assert message.startswith("model.layers.0.") and "\n" not in message
        assert f"{what}, which is not supported: supported is torchao's weight-only 8 and 4 bits" in message


@pytest.mark.parametrize(
    ("described", "what"),
    [
        ({"_type": "Int4TilePackedTo4dTensor", "_data": {}}, "is a Int4TilePackedTo4dTensor of torchao, which"),
        ({"_type": "Int8Tensor", "_data": {"act_quant_kwargs": {}}}, "of torchao that quantizes activations"),
        ({"_type": "Int8Tensor", "_data": {"block_size": [64, 128]}}, r"quantized in blocks of \[64, 128\]"),
        ({"_type": "Int8Tensor", "_data": []}, "quantized in blocks of None"),
        ({"_type": "Int8Tensor", "_data": {"block_size": [1, 64]}}, r"stored with scales of shape \[128, 1\] where"),
    ],
)
def test_a_checkpoint_that_says_something_else(plain, tmp_path, described, what):
    quantized_by_torchao(plain, CONFIGS["int8 rows"]).save_pretrained(tmp_path)
    change_metadata(tmp_path, "model.layers.0.self_attn.q_proj.weight", json.dumps(described))
    with pytest.raises(ValueError, match=what):
        load_checkpoint(tmp_path)


def test_damaged_metadata_and_missing_parts(plain, tmp_path):
    quantized_by_torchao(plain, CONFIGS["int8 rows"]).save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    change_metadata(tmp_path, name, '{"_type": "Int8Tensor"')
    with pytest.raises(ValueError, match=r"the metadata of model.layers.0.self_attn.q_proj.weight is not valid JSON"):
        load_checkpoint(tmp_path)
    change_metadata(tmp_path, name, '{"_type": "Tensor"}')
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_checkpoint(tmp_path)
    change_metadata(tmp_path, name, '{"_type": "Int8Tensor"}', without="model.layers.0.self_attn.q_proj._weight_qdata")
    with pytest.raises(ValueError, match=r"q_proj.weight is stored in parts that do not make a matrix"):
        load_checkpoint(tmp_path)


def change_metadata(folder, name, text, without=None):
    with Checkpoint(folder) as checkpoint:
        metadata = checkpoint.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(without, None)
    save_file(tensors, folder / "model.safetensors", metadata | {name: text})


def test_quantized_twice_is_refused(plain, tmp_path):
    model = quantized_by_torchao(plain, CONFIGS["int8 rows"])
    model.save_pretrained(tmp_path)
    for load in (lambda: load_checkpoint(tmp_path, quantization="int4"), lambda: from_transformers(model, "int4")):
        with pytest.raises(ValueError, match=r"quantization='int4': .*proj\.weight is quantized already, leave"):
            load()


def test_weights_of_one_pass_quantized_apart_are_refused():
    model = tiny_model("llama3", **SIZES)
    quantize_(model, CONFIGS["int8 rows"], lambda module, name: name.endswith(("q_proj", "v_proj", "o_proj")))
    with pytest.raises(TypeError, match=r"model\.layers\.0: q in 8 bits, k a tensor, v in 8 bits, expected all of one"):
        from_transformers(model)


def test_other_methods_name_what_is_supported(tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama2", tokenizer=False)
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(
        ValueError, match=r"'awq'.*the weights must be float32, float16 or bfloat16, or torchao's weight-"
    ):
        load_checkpoint(folder)
    model = tiny_model("llama2")
    model.hf_quantizer = object()
    with pytest.raises(
        ValueError, match=r"the model is quantized, which is not supported: .*, or in torchao's weight-"
    ):
        from_transformers(model)
    assert torchao.SUPPORTED.count("\n") == 0
