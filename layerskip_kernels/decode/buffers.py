from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from layerskip_kernels.decode.batch import Batch
from layerskip_kernels.decode.model import Model
from layerskip_kernels.decode.repetition import Repetition
from layerskip_kernels.ops import ExitHead, Sampling, Verified

_PER_REQUEST = ("temperature", "seed", "stream", "top_k", "top_p", "min_p")


class Buffers:
    """Flat storage for the largest round of a batch; `round(K)` gives the views for its present rows and K drafts."""

    def __init__(
        self, model: Model, batch: Batch, rows: int, drafts: int, *, sampled: bool, penalized: bool, logits: bool
    ):
        """`penalized`: with repetition penalties, of the drafts alone where `logits` are kept for others to choose."""
        self.model, self.batch = model, batch
        self.sampled, self.penalized, self.logits = sampled, penalized, logits
        self._rows, self._window = rows, drafts + 1
        self._flat: dict[str, torch.Tensor] = {}
        self._rounds: dict[tuple[int, int], Round] = {}

    def round(self, drafts: int) -> Round:
        key = (len(self.batch), drafts)
        if key not in self._rounds:
            self._rounds[key] = Round(self, *key)
        return self._rounds[key]

    def view(self, name: str, dtype: torch.dtype, rows: int, window: int = 1, *rest: int) -> torch.Tensor:
        """A contiguous [rows, window, *rest] tensor on the storage of `name`."""
        inner = torch.Size(rest).numel()
        if name not in self._flat:
            size = self._rows * self._window * inner
            self._flat[name] = torch.zeros(size, dtype=dtype, device=self.batch.lengths.device)
        return self._flat[name][: rows * window * inner].view(rows, window, *rest)


class Results(NamedTuple):
    """What the host reads of a round: views of one piece of memory, so that from a GPU one copy brings all of it."""

    memory: torch.Tensor  # uint8
    tokens: torch.Tensor  # [B, T] int64
    logprob: torch.Tensor  # [B, T] float32
    num_draft: torch.Tensor  # [B] int32, as the next two
    num_emitted: torch.Tensor
    num_accepted: torch.Tensor

    @classmethod
    def of(cls, memory: torch.Tensor, rows: int, window: int) -> Results:
        """`memory`, or a copy of it, may be longer than the results of so many rows are."""
        sizes = [8 * rows * window, 4 * rows * window, 4 * rows * 3]
        memory = memory[: sum(sizes)]
        tokens, logprob, counts = memory.split(sizes)
        return cls(
            memory,
            tokens.view(torch.int64).view(rows, window),
            logprob.view(torch.float32).view(rows, window),
            *counts.view(torch.int32).view(3, rows),
        )


class Round:
    """The tensors of one round: B rows, a window of T = K + 1 tokens each. All views, so a round allocates nothing."""

    def __init__(self, buffers: Buffers, rows: int, drafts: int):
        batch, config, rope = buffers.batch, buffers.model.config, buffers.model.rope
        window = drafts + 1

        def matrix(name: str, dtype: torch.dtype, *rest: int) -> torch.Tensor:
            return buffers.view(name, dtype, rows, window, *rest)

        def vector(name: str, dtype: torch.dtype) -> torch.Tensor:
            return buffers.view(name, dtype, rows)[:, 0]

        self._buffers = weakref.ref(buffers)  # which holds this round
        self.drafts, self.window, self.sampled = drafts, window, buffers.sampled
        self.lengths, self.slot_ids = batch.lengths[:rows], batch.slot_ids[:rows]
        self.pending, self.remaining, self.finished = (
            t[:rows] for t in (batch.pending, batch.remaining, batch.finished)
        )
        self.tokens = matrix("tokens", torch.int64)  # the pending token, then the drafts
        self.offsets = torch.arange(window, dtype=torch.int32, device=batch.lengths.device)
        self.positions = matrix("positions", torch.int32)
        self.step_lengths = buffers.view("step_lengths", torch.int32, window, rows)
        self.results = Results.of(matrix("results", torch.uint8, 8 + 4 + 4 * 3).view(-1), rows, window)
        self.num_draft = self.results.num_draft
        self.last = vector("last", torch.int64)
        self.exit_hidden = matrix("exit_hidden", buffers.model.dtype, config.hidden_size)
        self.exit_rows = self.exit_hidden.view(-1, config.hidden_size)
        self.inv_freq = self.rope_index = None
        if rope.position_dependent:
            self.inv_freq = matrix("inv_freq", torch.float32, config.head_dim // 2)
            self.rope_index = matrix("rope_index", torch.int32)

        self.target = matrix("target", torch.int64)
        scratch = matrix("target_confidence", torch.float32)
        self.logits = matrix("logits", torch.float32, config.vocab_size) if buffers.logits else None
        self.verify_head = ExitHead(self.target.view(-1), self.results.logprob.view(-1), scratch.view(-1))
        self.draft_head = ExitHead(
            vector("draft_token", torch.int64),
            vector("draft_logprob", torch.float32),
            vector("draft_confidence", torch.float32),
        )
        self.verified = Verified(
            self.results.tokens, self.results.num_emitted, self.results.num_accepted, self.finished
        )
        self.draft_sampling = self.verify_sampling = None
        if self.sampled:
            fields = {name: getattr(batch, name)[:rows] for name in _PER_REQUEST}
            repeated = {name: matrix(f"repeated_{name}", t.dtype) for name, t in fields.items()}
            self.repeated = [(fields[name], t) for name, t in repeated.items()]
            self.next_positions = matrix("next_positions", torch.int64)
            self.draft_sampling = Sampling(position=vector("draft_position", torch.int64), **fields)
            self.verify_sampling = Sampling(
                position=self.next_positions.view(-1), **{name: t.view(-1) for name, t in repeated.items()}
            )

        self.repetition = None
        if buffers.penalized:
            self.repetition = Repetition(batch, rows, window, config.vocab_size, matrix)

        self.step_tokens, self.step_rows = self.tokens.unbind(1), self.exit_hidden.unbind(1)
        self.step_hidden = self.exit_hidden.split(1, dim=1)
        # Of one sequence a draft goes where the next step reads it.
        in_place = [self.draft_head._replace(token=token) for token in self.step_tokens[1:]]
        self.draft_heads = in_place if rows == 1 else [self.draft_head] * drafts

        # What `Model.run_layers` needs to know of window position t alone, and of the whole window.
        self.at = [
            dict(
                lengths=self.step_lengths[t],
                positions=self.positions[:, t : t + 1],
                inv_freq=rope.inv_freq if self.inv_freq is None else self.inv_freq[:, t : t + 1],
                slot_ids=self.slot_ids,
            )
            for t in range(window)
        ]
        self.whole = dict(
            lengths=self.lengths,
            positions=self.positions,
            inv_freq=rope.inv_freq if self.inv_freq is None else self.inv_freq,
            slot_ids=self.slot_ids,
        )

    @property
    def buffers(self) -> Buffers:
        """What this is a round of."""
        return self._buffers()
