"""`ModelConfig.from_hf`: what each family maps to, and what is refused."""

import copy
import json

import pytest
import tiny_models
import torch
import transformers

from layerskip_kernels.models import ModelConfig, load_checkpoint

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def from_values(model_type, **values):
    return ModelConfig.from_hf(transformers.AutoConfig.for_model(model_type, **values))


def test_llama_3_2_1b():
    config = from_values(
        "llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=dict(LLAMA3_SCALING),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        dtype="bfloat16",
    )
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (128256, 2048, 8192)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (16, 32, 8, 64)
    assert (config.rms_norm_eps, config.scale, config.dtype) == (1e-5, 0.125, torch.bfloat16)
    assert config.rope.parameters == {**LLAMA3_SCALING, "rope_theta": 500000.0}
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert (config.bos_token_id, config.pad_token_id) == (128000, None)
    assert config.sliding_windows == (None,) * 16 and config.use_rope == (True,) * 16
    assert config.tie_word_embeddings
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    assert (config.exit_layer, config.num_speculations) == (None, None)


def test_llama_1_has_as_many_kv_heads_as_heads():
    config = from_values("llama", hidden_size=512, num_attention_heads=8, num_key_value_heads=None, eos_token_id=2)
    assert (config.num_kv_heads, config.head_dim, config.eos_token_ids) == (8, 64, (2,))
    assert not config.tie_word_embeddings


def test_llama_biases():
    config = from_values("llama", attention_bias=True, mlp_bias=True)
    assert config.qkv_bias and config.o_bias and config.mlp_bias


@pytest.mark.parametrize("window", [None, 4096])
def test_mistral_slides_in_every_layer(window):
    config = from_values("mistral", num_hidden_layers=3, sliding_window=window)
    assert config.sliding_windows == (window,) * 3


def test_qwen2_slides_from_max_window_layers_on():
    values = dict(num_hidden_layers=4, max_window_layers=3, sliding_window=128)
    config = from_values("qwen2", use_sliding_window=True, **values)
    assert config.sliding_windows == (None, None, None, 128)
    assert config.qkv_bias and not config.o_bias
    assert from_values("qwen2", use_sliding_window=False, **values).sliding_windows == (None,) * 4


def test_qwen2_layer_types_decide():
    config = from_values(
        "qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    assert config.sliding_windows == (64, None, 64)


def test_qwen3_head_dim_is_free():
    config = from_values(
        "qwen3", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128, attention_bias=False
    )
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (128, True, False)


def test_smollm3_rotates_three_layers_of_four():
    config = from_values("smollm3", num_hidden_layers=6, hidden_size=2048, num_attention_heads=16)
    assert config.use_rope == (True, True, True, False, True, True)
    assert config.sliding_windows == (None,) * 6
    assert config.rope.parameters["rope_theta"] == 2000000.0
    config = from_values(
        "smollm3", num_hidden_layers=4, no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=32
    )
    assert config.use_rope == (False, True, True, False)
    assert config.sliding_windows == (32, None, None, 32)


def test_reading_changes_nothing():
    hf_config = tiny_models.tiny_config("llama3", layerskip={"exit_layer": 2, "num_speculations": 5})
    before = copy.deepcopy(hf_config.to_dict())
    config = ModelConfig.from_hf(hf_config)
    config.rope.parameters["factor"] = 0.5
    assert hf_config.to_dict() == before


def test_recorded_exit_layer_survives_a_checkpoint(tmp_path):
    tiny_models.tiny_checkpoint(tmp_path, "smollm2", layerskip={"exit_layer": 2, "num_speculations": 5})
    assert json.loads((tmp_path / "config.json").read_text())["layerskip"] == {"exit_layer": 2, "num_speculations": 5}
    config = load_checkpoint(tmp_path).config
    assert (config.exit_layer, config.num_speculations) == (2, 5)


def test_recorded_exit_layer_alone():
    config = ModelConfig.from_hf(tiny_models.tiny_config("llama2", layerskip={"exit_layer": 1}))
    assert (config.exit_layer, config.num_speculations) == (1, None)


def test_generation_config_comes_first():
    hf_config = tiny_models.tiny_config("llama2")
    assert ModelConfig.from_hf(hf_config).eos_token_ids == (2,)
    assert ModelConfig.from_hf(hf_config, generation_config={"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert ModelConfig.from_hf(hf_config, generation_config={"do_sample": False}).eos_token_ids == (2,)
    generation_config = transformers.GenerationConfig(eos_token_id=5)
    assert ModelConfig.from_hf(hf_config, generation_config=generation_config).eos_token_ids == (5,)
    assert ModelConfig.from_hf(tiny_models.tiny_config("llama2", eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("gpt2", {}, r"model_type='gpt2' is not supported, supported are llama \(Llama 1 to 3.2, .*qwen3, smollm3"),
        ("mixtral", {}, "model_type='mixtral' is not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu' is"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "must be a LlamaForCausalLM"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(quant_method='gptq'\)"),
        ("llama", {"rope_scaling": {"rope_type": "spiral"}}, "rope_type='spiral' is not supported, supported are def"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama", {"head_dim": 12}, r"head_dim=12 is not supported, it must be a multiple of 8 in 8\.\.256"),
        ("llama", {"head_dim": 264}, "head_dim=264 is not supported"),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads=3 is not supported"),
        ("llama", {"dtype": "float64"}, "dtype=torch.float64 is not supported, choose float32, float16 or bfloat16"),
        ("llama", {"layerskip": 4}, "layerskip=4 in config.json must look like"),
        ("llama", {"layerskip": {"exit_layer": 32}}, r"exit_layer=32 .* has 32 layers, choose 1\.\.31"),
        ("llama", {"layerskip": {"exit_layer": True}}, r"exit_layer=True .*choose 1\.\.31"),
        ("llama", {"layerskip": {"num_speculations": 64}}, r"num_speculations=64 .*choose 0\.\.63"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "sliding_window=None: layers of type sliding_attention"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 32},
            "layer_types entry 'chunked_attention' is not supported",
        ),
        ("smollm3", {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 36}, "no_rope_layers has 2 entries"),
    ],
)
def test_refused_by_name(model_type, values, message):
    with pytest.raises(ValueError, match=message):
        from_values(model_type, **values)


def test_rope_parameters_per_layer_type_are_refused():
    hf_config = tiny_models.tiny_config("qwen3")
    hf_config.rope_parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    with pytest.raises(ValueError, match=r"rope_parameters=.* must be one set of parameters for all layers"):
        ModelConfig.from_hf(hf_config)
