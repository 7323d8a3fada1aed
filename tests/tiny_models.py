"""Tiny random models of every supported family, scaled so that their answers are not near-ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("llama2", "codellama", "llama3", "smollm2", "smollm3", "mistral", "qwen2", "qwen3")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "codellama": (
        "LlamaConfig",
        {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "llama3": (
        "LlamaConfig",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "smollm2": ("LlamaConfig", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}),
    "smollm3": ("SmolLM3Config", {"use_sliding_window": True, "sliding_window": 24}),
    "mistral": ("MistralConfig", {"sliding_window": 16, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": False}),
}


def tiny_config(family: str, **overrides: Any):
    """A transformers configuration of the family: 4 layers, hidden size 64 (48 for smollm2), 262 tokens."""
    import transformers

    class_name, values = _FAMILY[family]
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return getattr(transformers, class_name)(**{**common, **values, **overrides})


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, late_scale: float = 0.25, **overrides: Any
):
    """A transformers model with random weights, in eval mode.

    `late_scale` multiplies what the layers of the second half add to the hidden state: small values make an early exit
    agree with the last layer more often. It changes nothing else.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + normal(parameter, 0.1))
            elif name.endswith(".bias"):
                parameter.copy_(normal(parameter, 0.2))
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(normal(parameter, 0.5))
            else:
                parameter.copy_(normal(parameter, parameter.shape[1] ** -0.5))
            if "o_proj" in name or "down_proj" in name:
                late = int(name.split(".")[2]) >= config.num_hidden_layers // 2
                parameter.mul_(4.0 * (late_scale if late else 1.0))
    model.generation_config.eos_token_id = config.eos_token_id
    return model.to(dtype).eval()


def tiny_tokenizer():
    """A byte-level tokenizer: one token per byte, the special tokens first, `<|bos|>` in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_checkpoint(
    path: str | Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    tokenizer: bool = True,
    max_shard_size: str | int = "50GB",
    late_scale: float = 0.25,
    **overrides: Any,
) -> Path:
    """Saves ``tiny_model(...)`` and the tokenizer with ``save_pretrained`` into the folder `path`; returns it."""
    path = Path(path)
    model = tiny_model(family, dtype, seed, late_scale, **overrides)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Sets entries of the JSON object in a file; the value None removes one."""
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
