"""Loaded models, run through the reference ops, give transformers' float32 logits: every family, every rope type."""

import pytest
import tiny_models
import torch

from layerskip_kernels.models import Rope, from_transformers, load_checkpoint
from layerskip_kernels.reference import OPS

PROMPT, STEPS = 40, 12
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


class Run:
    """One sequence through the reference decoder: cache, rotary frequencies, logits of the last position."""

    def __init__(self, loaded, capacity=PROMPT + STEPS + 1):
        self.config, self.weights = loaded.config, loaded.weights
        config = self.config
        shape = (config.num_layers, 1, config.num_kv_heads, capacity, config.head_dim)
        self.k_cache, self.v_cache = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
        self.rope, self.length = Rope(config.rope), 0
        self.rope.reserve(capacity)

    def forward(self, tokens):
        count = len(tokens)
        positions = torch.arange(self.length, self.length + count, dtype=torch.int32)[None]
        inv_freq = self.rope.rows(positions) if self.length else self.rope.prefill(count)
        hidden = self.weights.embedding[tokens][None].clone()
        OPS["decoder_stack"](
            hidden,
            self.weights.layers,
            self.k_cache,
            self.v_cache,
            eps=self.config.rms_norm_eps,
            scale=self.config.scale,
            lengths=torch.tensor([self.length], dtype=torch.int32),
            positions=positions,
            inv_freq=inv_freq,
            attention_factor=self.rope.attention_factor,
        )
        self.length += count
        last = OPS["rms_norm"](hidden[0, -1:], self.weights.final_norm, self.config.rms_norm_eps)
        return (last @ self.weights.lm_head.T)[0]


def check_logits(model, loaded):
    """A prompt and greedy steps, both sides following transformers' own choice of token."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(6, tiny_models.VOCAB_SIZE, (PROMPT,), generator=generator)
    run = Run(loaded)
    with torch.inference_mode():
        expected = model(prompt[None], use_cache=True)
        torch.testing.assert_close(run.forward(prompt), expected.logits[0, -1], **TOLERANCE)
        for _ in range(STEPS):
            token = expected.logits[0, -1].argmax().view(1)
            expected = model(token[None], past_key_values=expected.past_key_values, use_cache=True)
            torch.testing.assert_close(run.forward(token), expected.logits[0, -1], **TOLERANCE)
    assert run.length == PROMPT + STEPS


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_family(family, tmp_path):
    model = tiny_models.tiny_model(family)
    check_logits(model, from_transformers(model))
    check_logits(model, load_checkpoint(tiny_models.tiny_checkpoint(tmp_path, family)))


@pytest.mark.parametrize(
    "variant",
    [
        ("llama2", {"attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True, "use_sliding_window": False}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": False}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    ],
    ids=lambda variant: variant[0],
)
def test_variant(variant):
    family, overrides = variant
    model = tiny_models.tiny_model(family, **overrides)
    check_logits(model, from_transformers(model))


@pytest.mark.parametrize("original", [PROMPT - 10, PROMPT - 1, PROMPT, PROMPT + 6], ids=lambda n: f"trained for {n}")
@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_rope_type_below_at_and_beyond_the_trained_length(rope_type, original):
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = original
    if rope_type == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type == "longrope":
        parameters |= {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [3.0 + i for i in range(8)]}
    limit = original if rope_type == "dynamic" else 4 * original
    model = tiny_models.tiny_model("llama2", rope_parameters=parameters, max_position_embeddings=limit)
    check_logits(model, from_transformers(model))
