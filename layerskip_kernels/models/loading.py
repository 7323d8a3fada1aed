"""From a checkpoint, or from a live transformers model, to what a decoder runs on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerskip_kernels.models import torchao
from layerskip_kernels.models.checkpoint import Checkpoint, read_json
from layerskip_kernels.models.config import MODEL_CLASSES, ModelConfig, check_supported, config_dtype, parse_dtype
from layerskip_kernels.models.hub import checkpoint_folder
from layerskip_kernels.models.quantization import bits_of, head_bits, quantized, read_torchao, refuse_twice
from layerskip_kernels.models.tuned import user_choice
from layerskip_kernels.models.weights import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    ModelWeights,
    assemble,
    check_tensors,
    linear_names,
    tensor_shapes,
)
from layerskip_kernels.ops.quantized import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for a decoder: configuration, weights, and the tokenizer and folder when there is one."""

    config: ModelConfig
    weights: ModelWeights
    tokenizer: PreTrainedTokenizerBase | None = None
    path: Path | None = None

    def head_to_copy(self) -> Tensor | QuantizedWeight:
        """The LM head `[V, C]`, for who reads all of it once.

        A memory-mapped one comes from a mapping of its own, so that its pages count as used memory no longer than this
        tensor lives: who decodes with a copy needs few of them.
        """
        head = self.weights.lm_head
        if self.path is None or isinstance(head, QuantizedWeight) or head.device.type != "cpu":
            return head
        with Checkpoint(self.path) as checkpoint:
            name = EMBEDDING if self.config.tie_word_embeddings else LM_HEAD
            return checkpoint.stored(name) if checkpoint.dtype(name) == head.dtype else head


def load_checkpoint(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> LoadedModel:
    """Loads a Hugging Face checkpoint: ``config.json``, safetensors weights, and the tokenizer if there is one.

    On the CPU and in their stored dtype the weights stay memory-mapped: do not overwrite the files while in use.
    No code of the checkpoint is run and no pickle is read. Weights that torchao has quantized stay so.

    Args:
        path_or_id: a local folder, or the id of a model on the hub.
        dtype: float32, float16 or bfloat16 (or their names); "auto" is the checkpoint's own.
        device: where the weights go.
        quantization: "int8" or "int4": linears are quantized one by one, in groups of 64 columns, and their originals
            let go of; the head in 8 bits either way. Norms, biases and the embedding table stay as they are. On the CPU
            alone.

    Raises:
        ValueError: a model, dtype or file format that is not supported, or files that are damaged or do not match.
        ConnectionError, PermissionError: the hub has no such model or cannot be reached; the model is gated.
    """
    wanted = None if isinstance(dtype, str) and dtype == "auto" else parse_dtype(dtype)
    folder = checkpoint_folder(path_or_id)
    hf_config = _read_config(folder)
    if choice := user_choice(folder):
        hf_config.layerskip = choice
    generation_config = None
    if (folder / "generation_config.json").is_file():
        generation_config = read_json(folder / "generation_config.json")
    config = _named(folder / "config.json", lambda: ModelConfig.from_hf(hf_config, generation_config=generation_config))
    device = torch.device(device)
    bits = bits_of(quantization, device)
    with Checkpoint(folder) as checkpoint:
        shapes = checkpoint.shapes()
        tensors: dict[str, Any] = read_torchao(checkpoint, shapes, device)
        check_tensors(config, shapes, checkpoint.where)
        dtype = wanted or config_dtype(hf_config) or checkpoint.dtype(FINAL_NORM)
        names = [name for name in {**tensor_shapes(config), LM_HEAD: ()} if name in shapes and name not in tensors]

        def read(name: str) -> Tensor:
            return checkpoint.tensor(name, dtype=dtype, device=device)

        if bits:
            refuse_twice(quantization, tensors)
            if config.tie_word_embeddings and LM_HEAD in names:
                config = _untie_if_different(config, {name: read(name) for name in (EMBEDDING, LM_HEAD)})
            source = {LM_HEAD: EMBEDDING} if config.tie_word_embeddings else {}
            for name in linear_names(config):
                stored = source.get(name, name)
                tensors[name] = quantized(name, read(stored), head_bits(bits) if name == LM_HEAD else bits)
                checkpoint.map_anew(stored)
        tensors |= {name: read(name) for name in names if name not in tensors}
    config, weights = _arranged(replace(config, dtype=dtype), tensors)
    return LoadedModel(config, weights, _read_tokenizer(folder), folder)


def from_transformers(model: PreTrainedModel, quantization: str | None = None) -> LoadedModel:
    """Uses the weights of a live transformers model, sharing their storage and leaving the model as it is.

    Rotary frequencies come from the configuration in float32, also where the model was cast as a whole
    (``model.half()``) and keeps rounded ones.

    `quantization`: see `load_checkpoint`; the quantized weights are copies. Weights that torchao has quantized stay so.

    Raises:
        TypeError: `model` is not one of transformers' supported causal language models.
        ValueError: it is quantized in another way, has adapters, or its weights are not on one device in one supported
            dtype.
    """
    model = getattr(model, "_orig_mod", model)
    tensors = _live_tensors(model)
    first = model.get_parameter(EMBEDDING)
    bits = bits_of(quantization, first.device)
    config = ModelConfig.from_hf(model.config, dtype=first.dtype, generation_config=model.generation_config)
    check_tensors(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda name: "the model")
    if bits:
        refuse_twice(quantization, tensors)
        config = _untie_if_different(config, tensors)
        for name in linear_names(config):
            tensors[name] = quantized(name, tensors[name], head_bits(bits) if name == LM_HEAD else bits)
    return LoadedModel(*_arranged(config, tensors))


def _arranged(config: ModelConfig, tensors: dict[str, Any]) -> tuple[ModelConfig, ModelWeights]:
    """The weights of a decoder. The embedding table, where torchao has quantized it too, as numbers again."""
    embedding = tensors[EMBEDDING]
    if isinstance(embedding, QuantizedWeight):
        tensors[EMBEDDING] = dequantize(embedding, config.dtype)
        tensors.setdefault(LM_HEAD, embedding)
    config = _untie_if_different(config, tensors)
    return config, assemble(config, tensors)


def _named(where: Path, read):
    """Puts the name of the file in front of what is wrong with its contents."""
    try:
        return read()
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # of values of any type
        raise ValueError(f"{where}: {error}") from error


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint")
    raw = read_json(path)
    # before transformers sees it: it would ask on the terminal whether to run such code
    if raw.get("auto_map"):
        raise ValueError(f"{path}: auto_map={raw['auto_map']} is not supported, code of a checkpoint is never run")
    _named(path, lambda: check_supported(raw.get))
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, each about the contents of this file
        raise ValueError(f"{path}: {error}") from error


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _untie_if_different(config: ModelConfig, tensors: dict[str, Tensor]) -> ModelConfig:
    """transformers' rule: a head stored beside the embedding it should be tied to stays apart when it differs."""
    embedding, head = tensors.get(EMBEDDING), tensors.get(LM_HEAD)
    if not (config.tie_word_embeddings and isinstance(embedding, Tensor) and isinstance(head, Tensor)):
        return config
    same = embedding.data_ptr() == head.data_ptr() or torch.equal(embedding, head)
    return config if same else replace(config, tie_word_embeddings=False)


def _live_tensors(model: PreTrainedModel) -> dict[str, Tensor | QuantizedWeight]:
    parameters = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, torch.nn.Module) else {}
    if any(".lora_" in name or ".base_layer." in name for name in parameters) or hasattr(model, "merge_and_unload"):
        raise ValueError(
            "the model has adapters that are not merged into its weights: use model.merge_and_unload() first"
        )
    check_class(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None or getattr(model, "is_quantized", False):
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
        if getattr(method, "value", method) != "torchao":
            raise ValueError(
                "the model is quantized, which is not supported: load it in float32, float16 or bfloat16, or in "
                f"{torchao.SUPPORTED}"
            )
    if EMBEDDING not in parameters:
        raise ValueError(f"the model has no parameter {EMBEDDING}")
    first = parameters[EMBEDDING]
    parse_dtype(first.dtype)
    for name, parameter in parameters.items():
        plain = not torchao.is_quantized(parameter.data)
        if plain and type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__}, only models with plain tensors are supported"
            )
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device, it has no data: load the weights on a real device first")
        if parameter.device != first.device:
            raise ValueError(
                f"{name} is on {parameter.device} but {EMBEDDING} is on {first.device}: "
                "load the model on one device, without device_map"
            )
        if parameter.dtype != first.dtype:
            raise ValueError(
                f"{name} is {parameter.dtype} but {EMBEDDING} is {first.dtype}: use model.to({first.dtype})"
            )
        if not plain and parameter.device.type != "cpu":
            raise ValueError(f"{name} is quantized, and quantized weights run on the CPU alone")
        if plain and not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous, with strides {parameter.stride()}")
    return {
        name: torchao.from_tensor(name, parameter.data) if torchao.is_quantized(parameter.data) else parameter.detach()
        for name, parameter in parameters.items()
    }


def check_class(model: object) -> None:
    """Raises TypeError when `model` is not one of transformers' supported causal language models."""
    for cls in type(model).__mro__:
        if cls.__name__ in MODEL_CLASSES.values() and cls.__module__.startswith("transformers."):
            return
    raise TypeError(
        f"model is a {type(model).__name__}, supported are transformers' {', '.join(sorted(MODEL_CLASSES.values()))}"
    )
