"""How probable a model finds a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.decoder import CAPACITY_STEP
from layerskip_kernels.decode.model import Model
from layerskip_kernels.decode.prompts import encode
from layerskip_kernels.measure.teacher import WINDOW, heads, pieces


class Likelihood:
    """Log-likelihoods of continuations under the first `last_layer` layers of a decoder's model (None: all of them).

    A continuation of up to 64 tokens runs through the kernels that decode, in their numbers, so it is greedy exactly if
    decoding would say it. What comes out depends on context and continuation alone. Continuations of one context that
    are asked for one after the other share its prefill.
    """

    def __init__(self, decoder, last_layer: int | None = None):
        self.model: Model = decoder.model
        self.last_layer = self.model.config.num_layers if last_layer is None else last_layer
        self._cache: KVCache | None = None
        self._context: list[int] = []  # what is in the cache
        self._after: tuple[Tensor, Tensor] | None = None  # what is said after it: token [1], logits [1, V]

    @torch.inference_mode()
    def __call__(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of the continuation in nats, and whether greedy decoding would say it.

        Both are token ids; the context has at least one. Raises ValueError for ids outside the vocabulary,
        FloatingPointError when the logits are not numbers.
        """
        vocab_size = self.model.config.vocab_size
        (context,) = encode([list(context)], None, vocab_size)
        if not continuation:
            return 0.0, True
        (continuation,) = encode([list(continuation)], None, vocab_size)
        ids = torch.tensor([*context, *continuation], dtype=torch.int64, device=self.model.device)
        targets = ids[len(context) :]
        prompt_length = len(context) if len(continuation) <= WINDOW else len(ids) - 1
        total, greedy, at = 0.0, True, 0
        for token, logits in self._said(ids[:-1], context, prompt_length):
            part = targets[at : at + len(token)]
            total += logits.log_softmax(-1).gather(1, part[:, None]).double().sum().item()
            greedy = greedy and torch.equal(token, part)
            at += len(token)
        if math.isnan(total):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise FloatingPointError(
                f"the logits are not numbers (NaN): the checkpoint's weights are damaged or overflow in {dtype}"
            )
        return total, greedy

    def _said(self, ids: Tensor, context: list[int], prompt_length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the model says from the context's last token on: tokens [n] and logits [n, V], part by part."""
        shared = prompt_length == len(context)
        start = 0
        if shared and context == self._context and self._cache.capacity >= len(ids):
            start = prompt_length
            yield self._after
        else:
            self._context = []
            self._reserve(len(ids))
        first = len(context) - 1
        for piece in pieces(self.model, self._cache, ids, prompt_length, start):
            piece.run_layers(0, self.last_layer)
            for _, token, logits in heads(self.model, piece.hidden[0, max(first - piece.start, 0) :]):
                if shared and piece.stop == prompt_length:
                    self._context, self._after = context, (token, logits)
                yield token, logits

    def _reserve(self, length: int) -> None:
        if self._cache is None or self._cache.capacity < length:
            self._cache = None  # free the old one first
            capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
            self._cache = KVCache(self.model.config, 1, capacity, self.model.dtype, self.model.device)
