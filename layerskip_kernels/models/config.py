"""What a decoder needs to know about a model, read from its Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip_kernels.messages import shown
from layerskip_kernels.models import torchao
from layerskip_kernels.models.rope import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
SUPPORTED_MODELS = "llama (Llama 1 to 3.2, CodeLlama, SmolLM2), mistral, qwen2 (Qwen2, Qwen2.5), qwen3, smollm3"
MAX_LAYERS = 4096
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder-only model; letters C, I, L, H, G, D, V as in the README.

    ``sliding_windows`` and ``use_rope`` have one entry per layer. ``exit_layer`` and ``num_speculations`` are the
    values recorded with the checkpoint, in the ``layerskip`` entry of its ``config.json``; ``repetition_penalty`` is
    the default of its ``generation_config.json``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    use_rope: tuple[bool, ...]
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    dtype: torch.dtype
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    exit_layer: int | None = None
    num_speculations: int | None = None
    repetition_penalty: float = 1.0

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5

    @classmethod
    def from_hf(
        cls,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype | None = None,
        generation_config: Any = None,
    ) -> ModelConfig:
        """Reads a transformers configuration, without changing it.

        Args:
            config: what ``AutoConfig.from_pretrained`` or ``model.config`` gives.
            dtype: dtype of the weights; None takes the one in `config`, else float32.
            generation_config: ``GenerationConfig`` or the dictionary of ``generation_config.json``; its end-of-sequence
                ids come before those of `config`. Of its defaults for decoding, the repetition penalty is taken.

        Raises ValueError, naming what was found and what is supported, for a model this package cannot run.
        """
        get = _getter(config)
        check_supported(get)
        model_type, num_layers, num_heads = config.model_type, config.num_hidden_layers, config.num_attention_heads
        head_dim = get("head_dim") or config.hidden_size // num_heads
        num_kv_heads = get("num_key_value_heads") or num_heads
        _check_heads(num_heads, num_kv_heads, head_dim)
        act = get("hidden_act")
        if act not in ("silu", "swish"):
            raise ValueError(f"hidden_act={act!r} is not supported, only 'silu' is")
        biases = bool(get("attention_bias")) and model_type != "mistral"
        exit_layer, num_speculations = _recorded_exit(get("layerskip"), num_layers)
        eos = _getter(generation_config)("eos_token_id")
        return cls(
            model_type=model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.rms_norm_eps),
            tie_word_embeddings=bool(get("tie_word_embeddings")),
            max_position_embeddings=config.max_position_embeddings,
            sliding_windows=_sliding_windows(get, num_layers),
            use_rope=_use_rope(get, num_layers),
            rope=_rope(config, head_dim),
            eos_token_ids=_token_ids(eos if eos is not None else get("eos_token_id"), config.vocab_size),
            bos_token_id=get("bos_token_id"),
            pad_token_id=get("pad_token_id"),
            dtype=dtype or config_dtype(config) or torch.float32,
            qkv_bias=True if model_type == "qwen2" else biases,
            o_bias=False if model_type == "qwen2" else biases,
            mlp_bias=model_type in ("llama", "smollm3") and bool(get("mlp_bias")),
            qk_norm=model_type == "qwen3",
            exit_layer=exit_layer,
            num_speculations=num_speculations,
            repetition_penalty=_repetition_penalty(_getter(generation_config)("repetition_penalty")),
        )


def check_supported(get: Callable[[str], Any]) -> None:
    """Raises ValueError when the model type, class or weight format of a configuration is not supported.

    `get` maps a name of ``config.json`` to its value, None when it is absent.
    """
    model_type = get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_CLASSES:
        raise ValueError(f"model_type={model_type!r} is not supported, supported are {SUPPORTED_MODELS}")
    architectures = get("architectures")
    if architectures and not (isinstance(architectures, list) and MODEL_CLASSES[model_type] in architectures):
        raise ValueError(
            f"architectures={architectures} is not supported, "
            f"a model of type {model_type!r} must be a {MODEL_CLASSES[model_type]}"
        )
    layers = get("num_hidden_layers")
    if isinstance(layers, int) and not 1 <= layers <= MAX_LAYERS:  # before a list of so many entries is made
        raise ValueError(f"num_hidden_layers={layers} is not supported, choose 1..{MAX_LAYERS}")
    if quantization := get("quantization_config"):
        method = _getter(quantization)("quant_method")
        method = str(getattr(method, "value", method))
        if method != "torchao":
            raise ValueError(
                f"quantization_config (quant_method={method!r}) is not supported, the weights must be float32, "
                f"float16 or bfloat16, or {torchao.SUPPORTED}"
            )


def config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The dtype a configuration names, None when it names none.

    Raises ValueError when it is not float32, float16 or bfloat16.
    """
    dtype = getattr(config, "dtype", None)
    return dtype if dtype is None else parse_dtype(dtype)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A ``torch.dtype`` from itself or its name. Raises ValueError when it is not float32, float16 or bfloat16."""
    parsed = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or parsed not in SUPPORTED_DTYPES:
        given = shown(dtype).strip("'")
        raise ValueError(f"dtype={given} is not supported, choose float32, float16 or bfloat16")
    return parsed


def _getter(values: Any) -> Callable[[str], Any]:
    if values is None:
        return lambda name: None
    if isinstance(values, dict):
        return values.get
    return lambda name: getattr(values, name, None)


def _check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_key_value_heads={num_kv_heads} is not supported, it must divide num_attention_heads={num_heads}"
        )
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"head_dim={head_dim} is not supported, it must be a multiple of 8 in 8..256")


def _sliding_windows(get: Callable[[str], Any], num_layers: int) -> tuple[int | None, ...]:
    window, model_type = get("sliding_window"), get("model_type")
    if model_type == "llama":
        return (None,) * num_layers
    # Mistral's model ignores layer_types: sliding_window alone decides, for every layer
    if model_type == "mistral":
        layer_types = ["full_attention" if window is None else "sliding_attention"] * num_layers
    else:
        layer_types = get("layer_types") or ["full_attention"] * num_layers
    if len(layer_types) < num_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for num_hidden_layers={num_layers}")
    for kind in layer_types[:num_layers]:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"layer_types entry {kind!r} is not supported, only full_attention and sliding_attention are"
            )
        if kind == "sliding_attention" and (window is None or window < 1):
            raise ValueError(f"sliding_window={window}: layers of type sliding_attention need at least 1")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types[:num_layers])


def _use_rope(get: Callable[[str], Any], num_layers: int) -> tuple[bool, ...]:
    if get("model_type") != "smollm3":
        return (True,) * num_layers
    layers = get("no_rope_layers")
    if len(layers) < num_layers:
        raise ValueError(f"no_rope_layers has {len(layers)} entries for num_hidden_layers={num_layers}")
    # despite its name, 1 means that the layer rotates
    return tuple(bool(rotates) for rotates in layers[:num_layers])


def _rope(config: PretrainedConfig, head_dim: int) -> RopeConfig:
    parameters = config.rope_parameters
    if isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(
            f"rope_parameters={parameters} is not supported, it must be one set of parameters for all layers"
        )
    config = deepcopy(config)
    # moves what older configurations keep elsewhere into rope_parameters, as the rotary module does on its first use
    config.standardize_rope_params()
    return RopeConfig(config.rope_parameters, head_dim, config.max_position_embeddings)


def _recorded_exit(recorded: Any, num_layers: int) -> tuple[int | None, int | None]:
    if recorded is None:
        return None, None
    if not isinstance(recorded, dict):
        raise ValueError(
            f'layerskip={recorded!r} in config.json must look like {{"exit_layer": 4, "num_speculations": 6}}'
        )
    exit_layer, num_speculations = recorded.get("exit_layer"), recorded.get("num_speculations")
    if exit_layer is not None and (type(exit_layer) is not int or not 1 <= exit_layer < num_layers):
        raise ValueError(
            f"layerskip.exit_layer={exit_layer!r} in config.json: the model has {num_layers} layers, "
            f"choose 1..{num_layers - 1}"
        )
    if num_speculations is not None and (type(num_speculations) is not int or not 0 <= num_speculations <= 63):
        raise ValueError(f"layerskip.num_speculations={num_speculations!r} in config.json: choose 0..63")
    return exit_layer, num_speculations


def _repetition_penalty(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"repetition_penalty={shown(value)} in generation_config.json: must be above 0")
    return float(value)


def _token_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Those of the end-of-sequence ids that the model can emit."""
    if ids is None:
        return ()
    ids = tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    if not all(type(token) is int for token in ids):
        raise ValueError(f"eos_token_id={list(ids)}: expected whole numbers")
    return tuple(token for token in ids if 0 <= token < vocab_size)
