"""A text through the model piece by piece, each token given all true tokens before it, in the numbers of decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from layerskip_kernels.decode.batch import SamplingOptions
from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.model import Model
from layerskip_kernels.decode.prefill import CHUNK, SHORT_PROMPT
from layerskip_kernels.ops import ExitHead, Sampling

WINDOW = 64  # the widest window of the decoding kernels; heads run on as many rows


class Piece:
    """Tokens [start, stop) of a text in slot 0 of a cache that holds those before them.

    `hidden` [1, stop - start, C] begins as their embeddings.
    """

    def __init__(self, model: Model, cache: KVCache, ids: Tensor, start: int, stop: int, prompt_length: int):
        self.model, self.cache, self.start, self.stop = model, cache, start, stop
        self.prefill = start < prompt_length and prompt_length >= SHORT_PROMPT
        self.hidden = model.weights.embedding[ids[start:stop]][None]
        positions = torch.arange(start, stop, dtype=torch.int32, device=model.device)[None]
        self.where = dict(
            lengths=positions[:, 0].clone(),
            positions=positions,
            inv_freq=_inv_freq(model, positions, prompt_length),
            slot_ids=torch.zeros(1, dtype=torch.int32, device=model.device),
        )

    def run_layers(self, first: int, last: int) -> None:
        """Layers [first, last) on `hidden`, in place."""
        self.model.run_layers(first, last, self.hidden, self.cache, prefill=self.prefill, **self.where)

    def run_draft_layers(self, first: int, last: int, hidden: Tensor) -> None:
        """Layers [first, last) as they draft, on `hidden` [1, stop - start, C], in place.

        What they write into the cache is there until `run_layers` writes over it.
        """
        self.model.run_layers(first, last, hidden, self.cache, drafts=True, prefill=self.prefill, **self.where)


def pieces(model: Model, cache: KVCache, ids: Tensor, prompt_length: int, start: int = 0) -> Iterator[Piece]:
    """The text ids [N] int64 as decoding would run it: the prompt as prefill does, the rest in windows.

    `start`: 0, or `prompt_length` when the cache has the prompt. The caller runs every layer that it reads of a piece
    before it asks for the next one.
    """
    model.rope.reserve(len(ids))
    cuts = [(at, min(at + CHUNK, prompt_length)) for at in range(start, prompt_length, CHUNK)]
    cuts += [(at, min(at + WINDOW, len(ids))) for at in range(prompt_length, len(ids), WINDOW)]
    for first, last in cuts:
        yield Piece(model, cache, ids, first, last, prompt_length)


def heads(
    model: Model, hidden: Tensor, position: int = 0, sampling: SamplingOptions | None = None, *, drafts: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Final norm and LM head on hidden [N, C], in parts so that no [N, V] is held.

    Yields the rows of a part, what the model says there [n] int64, and its logits [n, V] float32. With `sampling` it
    draws the tokens, with the noise that decoding has at `position` and on. `drafts`: by the head that drafts.
    """
    for start in range(0, len(hidden), WINDOW):
        part = slice(start, start + WINDOW)
        rows = hidden[part]
        out = ExitHead(
            torch.empty(len(rows), dtype=torch.int64, device=model.device),
            torch.empty(len(rows), dtype=torch.float32, device=model.device),
            torch.empty(len(rows), dtype=torch.float32, device=model.device),
        )
        logits = torch.empty(len(rows), model.config.vocab_size, device=model.device)
        noise = sampling and _sampling(sampling, position + start, len(rows), model.device)
        (model.draft_head if drafts else model.head)(rows, noise, out, logits)
        yield part, out.token, logits


def _inv_freq(model: Model, positions: Tensor, prompt_length: int) -> Tensor:
    if positions[0, 0] < prompt_length:
        return model.rope.prefill(prompt_length)
    return model.rope.rows(positions) if model.rope.position_dependent else model.rope.inv_freq


def _sampling(options: SamplingOptions, position: int, rows: int, device: torch.device) -> Sampling:
    """The noise of `rows` tokens of one request, the first of them at `position`."""
    dtypes = dict(
        temperature=torch.float32,
        seed=torch.int64,
        stream=torch.int64,
        top_k=torch.int64,
        top_p=torch.float32,
        min_p=torch.float32,
    )
    values = {name: torch.full((rows,), getattr(options, name), dtype=t, device=device) for name, t in dtypes.items()}
    return Sampling(position=torch.arange(position, position + rows, device=device), **values)
