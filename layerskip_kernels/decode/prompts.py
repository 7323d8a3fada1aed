from __future__ import annotations

from typing import Any

import torch


def encode(prompts: Any, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Token ids of each prompt. Raises TypeError or ValueError, naming the prompt, when there are none to be had."""
    if isinstance(prompts, torch.Tensor):
        if prompts.dim() not in (1, 2) or prompts.dtype not in (torch.int64, torch.int32):
            dtype = str(prompts.dtype).removeprefix("torch.")
            raise TypeError(f"prompts: a {dtype} tensor of shape {list(prompts.shape)}, expected int64 [P] or [B, P]")
        prompts = _ids("prompts", prompts)
    if isinstance(prompts, str) or (isinstance(prompts, (list, tuple)) and prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts: expected text, token ids or a list of them, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts: an empty list, at least one prompt is needed")
    return [_encode_one(f"prompts[{i}]", prompt, tokenizer, vocab_size) for i, prompt in enumerate(prompts)]


def _encode_one(name: str, prompt: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name}: text needs a tokenizer and the checkpoint has none, give token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: not text, it has half a surrogate pair at position {error.start}") from error
        prompt = tokenizer(prompt).input_ids
    if isinstance(prompt, torch.Tensor):
        prompt = _ids(name, prompt)
    if not isinstance(prompt, (list, tuple)) or not all(type(token) is int for token in prompt):
        raise TypeError(f"{name}: expected text or a list of token ids, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError(f"{name}: empty, at least one token is needed")
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: token id {token} is outside the vocabulary, 0..{vocab_size - 1}")
    return list(prompt)


def _ids(name: str, tensor: torch.Tensor) -> Any:
    if tensor.is_meta:
        raise TypeError(f"{name}: a tensor on the meta device holds no token ids")
    return tensor.tolist()
