"""Llama checkpoints as GGUF files, for llama.cpp. Needs layerskip_kernels[gguf]."""

from pathlib import Path

import gguf
import torch
from transformers import AutoConfig

from layerskip_kernels.models import ModelConfig
from layerskip_kernels.models.checkpoint import Checkpoint
from layerskip_kernels.models.weights import LM_HEAD, tensor_shapes

BF16, F32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32


def write_gguf(folder: Path, output: Path) -> None:
    """Writes the matrices in bfloat16 and the norms in float32, without a tokenizer; `output` appears whole or not.

    Raises ValueError for what llama.cpp's "llama" architecture would compute differently.
    """
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(folder))
    if config.model_type != "llama" or config.rope.rope_type != "default":
        raise ValueError(
            f"{folder}: only model_type='llama' with rope_type='default' is written, "
            f"found {config.model_type!r} with {config.rope.rope_type!r}"
        )
    partial = output.with_name(f".{output.name}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        _write_settings(writer, config)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
        with Checkpoint(folder) as checkpoint:
            wanted = list(tensor_shapes(config))
            if LM_HEAD in checkpoint.file_of and LM_HEAD not in wanted:
                wanted.append(LM_HEAD)
            for name in wanted:
                tensor = checkpoint.tensor(name, dtype=torch.bfloat16, device=torch.device("cpu"))
                heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
                _add(writer, names.get_name(name, try_suffixes=(".weight",)), _paired(tensor, heads))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def bytes_per_token(file: Path) -> tuple[int, dict[str, int]]:
    """What decoding a token reads of the file's weights, and the bytes of each type; a tied embedding is the head."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    types: dict[str, int] = {}
    for tensor in tensors.values():
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return sum(types.values()), types


def _write_settings(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope.parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _paired(weight: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows of a q or k projection in llama.cpp's order: it rotates neighbours, transformers halves of a head."""
    if heads is None:
        return weight
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(weight.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy(), raw_dtype=F32)
    else:
        writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=BF16)
