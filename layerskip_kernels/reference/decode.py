"""LayerSkip decoding (arXiv 2404.16710) of one sequence, greedy, as plainly as it can be said.

The specification of `layerskip_kernels.decode`: no batches, no buffers, one Python loop per strategy.
"""

from __future__ import annotations

import torch

from layerskip_kernels.models.config import ModelConfig
from layerskip_kernels.models.rope import Rope
from layerskip_kernels.models.weights import ModelWeights
from layerskip_kernels.ops.decoder_stack import DecoderLayers
from layerskip_kernels.reference import OPS


class ReferenceDecoder:
    """One sequence's state: the cache of every layer, and `length`, the positions valid in it."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, capacity: int):
        self.config, self.weights = config, weights
        self.rope = Rope(config.rope)
        self.rope.reserve(capacity)
        shape = (config.num_layers, 1, config.num_kv_heads, capacity, config.head_dim)
        self.k_cache, self.v_cache = (torch.full(shape, torch.nan, dtype=weights.embedding.dtype) for _ in "kv")
        self.length = 0

    def autoregressive(self, prompt: list[int], max_new_tokens: int, eos_ids=(), last_layer: int | None = None):
        """Token by token through layers [0, last_layer): all of them, or fewer for plain early exit."""
        last_layer = last_layer or self.config.num_layers
        tokens = [self.prefill(prompt, last_layer)]
        while len(tokens) < max_new_tokens and tokens[-1] not in eos_ids:
            hidden = self.layers(0, last_layer, self.embed([tokens[-1]]), self.length)
            self.length += 1
            tokens += self.head(hidden)
        return tokens

    def self_speculative(
        self, prompt: list[int], max_new_tokens: int, exit_layer: int, num_speculations: int, eos_ids=()
    ):
        """Draft with layers [0, exit_layer), verify with the rest, keep what they agree on."""
        tokens = [self.prefill(prompt, self.config.num_layers)]
        while len(tokens) < max_new_tokens and tokens[-1] not in eos_ids:
            # 1. Draft: each token's early hidden state is kept for the verification.
            window, exit_hidden = [tokens[-1]], []
            for t in range(num_speculations):
                exit_hidden.append(self.layers(0, exit_layer, self.embed([window[-1]]), self.length + t))
                window += self.head(exit_hidden[-1])
            # 2. The early layers once more, on the last draft.
            last = self.length + num_speculations
            exit_hidden.append(self.layers(0, exit_layer, self.embed([window[-1]]), last))
            # 3. Verify: the remaining layers on all of the window at once.
            hidden = self.layers(exit_layer, self.config.num_layers, torch.cat(exit_hidden), self.length)
            target = self.head(hidden)
            # 4. Accept the drafts up to the first that differs, and the model's own token there.
            accepted = 0
            while accepted < num_speculations and window[accepted + 1] == target[accepted]:
                accepted += 1
            emitted = target[: accepted + 1][: max_new_tokens - len(tokens)]
            for i, token in enumerate(emitted):
                if token in eos_ids:
                    emitted = emitted[: i + 1]
                    break
            tokens += emitted
            # 5. Roll back: what lies behind the new length is never read.
            self.length += len(emitted)
        return tokens

    def prefill(self, prompt: list[int], last_layer: int) -> int:
        hidden = self.layers(0, last_layer, self.embed(prompt), 0, self.rope.prefill(len(prompt)))
        self.length = len(prompt)
        return self.head(hidden[-1:])[0]

    def embed(self, tokens: list[int]) -> torch.Tensor:
        return self.weights.embedding[torch.tensor(tokens)]

    def layers(self, first: int, last: int, hidden: torch.Tensor, start: int, inv_freq=None) -> torch.Tensor:
        """Layers [first, last) on hidden [T, C], whose row t stands at position start + t."""
        hidden = hidden[None].clone()
        positions = torch.arange(start, start + hidden.shape[1], dtype=torch.int32)[None]
        OPS["decoder_stack"](
            hidden,
            DecoderLayers(self.weights.layers[first:last]),
            self.k_cache[first:last],
            self.v_cache[first:last],
            eps=self.config.rms_norm_eps,
            scale=self.config.scale,
            lengths=positions[:, 0],
            positions=positions,
            inv_freq=self.rope.rows(positions) if inv_freq is None else inv_freq,
            attention_factor=self.rope.attention_factor,
        )
        return hidden[0]

    def head(self, hidden: torch.Tensor) -> list[int]:
        weights = self.weights
        result = OPS["exit_head"](hidden, weights.final_norm, weights.lm_head, eps=self.config.rms_norm_eps)
        return result.token.tolist()
