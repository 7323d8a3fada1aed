"""`Rope` against transformers' own rotary module, stepped through a prompt and a decode."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from layerskip_kernels.models import ModelConfig, Rope

HEAD_DIM = 16
HALF = HEAD_DIM // 2
MAX = 32  # positions the tiny models were "trained" for
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": MAX},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": MAX,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": MAX,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": MAX,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


def hf_config(name, theta=10000.0):
    long = name not in ("default", "dynamic")
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=4 * MAX if long else MAX,
        rope_parameters={**SCALINGS[name], "rope_theta": theta},
    )


def rope_of(config):
    return Rope(ModelConfig.from_hf(config).rope)


def step(rotary, positions):
    """One forward of transformers' module; the frequencies it used."""
    rotary(torch.zeros(1), torch.tensor([positions]))
    return rotary.inv_freq


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factor_are_transformers_own(name, theta):
    config = hf_config(name, theta)
    rotary, rope = LlamaRotaryEmbedding(config), rope_of(config)
    assert rope.inv_freq.dtype == torch.float32 and rope.inv_freq.shape == (HALF,)
    assert torch.equal(rope.inv_freq, rotary.inv_freq)
    assert rope.attention_factor == rotary.attention_scaling
    assert rope.position_dependent == (name in ("dynamic", "longrope"))


def test_some_types_scale_attention():
    assert all(rope_of(hf_config(name)).attention_factor > 1.0 for name in ("yarn", "yarn-mscale", "longrope"))


@pytest.mark.parametrize("prompt", [1, MAX - 3, MAX - 1, MAX, MAX + 1, MAX + 9])
@pytest.mark.parametrize("name", SCALINGS)
def test_prompt_then_decode_across_the_threshold(name, prompt):
    config = hf_config(name)
    rotary, rope = LlamaRotaryEmbedding(config), rope_of(config)
    steps = range(prompt, MAX + 20)
    rope.reserve(len(steps) + prompt)
    assert torch.equal(rope.prefill(prompt), step(rotary, list(range(prompt))))
    for position in steps:
        expected = step(rotary, [position])
        assert torch.equal(rope.rows(torch.tensor([[position]], dtype=torch.int32))[0, 0], expected), position


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_prompts_and_decodes_differ_beyond_the_threshold(name):
    rope = rope_of(hf_config(name))
    rope.reserve(MAX + 8)
    inside, beyond = rope.rows(torch.tensor([[MAX - 1, MAX]], dtype=torch.int32))[0]
    assert torch.equal(inside, rope.inv_freq)
    assert not torch.equal(beyond, rope.inv_freq)
    assert torch.equal(rope.prefill(MAX), rope.inv_freq)
    assert torch.equal(rope.prefill(MAX + 1), beyond)


@pytest.mark.parametrize("name", ["default", "dynamic", "longrope"])
def test_rows_of_a_batch_of_windows(name):
    rope = rope_of(hf_config(name))
    rope.reserve(MAX + 40)
    positions = torch.tensor([[0, 1, 2], [MAX - 2, MAX - 1, MAX], [MAX + 30, MAX + 31, MAX + 39]], dtype=torch.int32)
    before = positions.clone()
    out, index = torch.full((3, 3, HALF), float("nan")), torch.empty(3, 3, dtype=torch.int32)
    assert rope.rows(positions, out=out, index=index) is out
    assert torch.equal(positions, before)
    for b in range(3):
        for t in range(3):
            single = rope.rows(positions[b : b + 1, t : t + 1])
            assert torch.equal(out[b, t], single[0, 0])


def test_tables_are_no_longer_than_needed():
    longrope, dynamic = rope_of(hf_config("longrope")), rope_of(hf_config("dynamic"))
    longrope.reserve(100_000)
    assert len(longrope._table) == 2
    dynamic.reserve(MAX)
    assert len(dynamic._table) == 1
    dynamic.reserve(MAX + 5)
    assert len(dynamic._table) == 6
    dynamic.reserve(MAX)
    assert len(dynamic._table) == 6


def test_growing_the_table_keeps_its_rows():
    once, twice = rope_of(hf_config("dynamic")), rope_of(hf_config("dynamic"))
    once.reserve(MAX + 10)
    twice.reserve(MAX + 3)
    twice.reserve(MAX + 10)
    assert torch.equal(once._table, twice._table)


def test_built_under_another_default_device():
    with torch.device("meta"):
        rope = rope_of(hf_config("longrope"))
    assert rope.device.type == "cpu" and torch.isfinite(rope.prefill(MAX + 1)).all()


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_old_configurations(key):
    """`rope_theta` and `rope_scaling` as checkpoints wrote them before `rope_parameters`."""
    old = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=4 * MAX,
        rope_theta=50000.0,
        rope_scaling={key: "linear", "factor": 4.0},
    )
    assert torch.equal(rope_of(old).inv_freq, rope_of(hf_config("linear", 50000.0)).inv_freq)


def test_original_length_outside_the_rope_parameters():
    """Phi-3 style: the length that separates short from long stands beside the scaling, not in it."""
    scaling = {name: value for name, value in SCALINGS["longrope"].items() if name.endswith(("type", "_factor"))}
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=4 * MAX,
        original_max_position_embeddings=MAX,
        rope_scaling=scaling,
    )
    rope, expected = rope_of(config), rope_of(hf_config("longrope"))
    assert rope.attention_factor == expected.attention_factor == LlamaRotaryEmbedding(config).attention_scaling
    assert torch.equal(rope.prefill(MAX + 1), expected.prefill(MAX + 1))
    assert torch.equal(rope.prefill(MAX), expected.prefill(MAX))


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="length=0: a prompt has at least 1 token"):
        rope_of(hf_config("default")).prefill(0)
