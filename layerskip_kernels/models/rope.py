"""Rotary position embedding: frequencies of every scaling type that transformers knows, ready for ``rope_append``.

The formulas are transformers' own, called through ``ROPE_INIT_FUNCTIONS``: every supported family builds its
frequencies that way. The plain one stands here, because the module that holds transformers' takes a second and 55 MB
to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


@dataclass(frozen=True)
class RopeConfig:
    """What determines the rotary frequencies of a model.

    ``parameters`` is transformers' ``rope_parameters``: ``rope_type``, ``rope_theta`` and what the type needs.

    Raises ValueError when the rope type is not one of ``ROPE_TYPES`` or only part of a head is rotated.
    """

    parameters: Mapping[str, Any]
    head_dim: int
    max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={self.rope_type!r} is not supported, supported are {', '.join(ROPE_TYPES)}")
        partial = self.parameters.get("partial_rotary_factor")
        # "proportional" pads the frequencies with zeros to the full head, so it needs nothing special
        if partial not in (None, 1, 1.0) and self.rope_type != "proportional":
            raise ValueError(f"partial_rotary_factor={partial} is not supported, heads must be rotated in full (1.0)")

    @property
    def rope_type(self) -> str:
        return self.parameters.get("rope_type", self.parameters.get("type", "default"))

    def _for_transformers(self) -> LlamaConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.head_dim,
            num_attention_heads=1,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.parameters),
        )


class Rope:
    """Rotary frequencies of one model, float32 on one device.

    Attributes:
        rope_type: one of ``ROPE_TYPES``.
        inv_freq: ``[D/2]`` float32, the frequencies of every position; of the short ones if ``position_dependent``.
        attention_factor: what cos and sin are multiplied by.
        position_dependent: True for ``dynamic`` and ``longrope``, whose frequencies change with the sequence length.
            transformers takes that length from the largest position of a call. Here a decoding row takes its own
            position + 1 (``rows``) and a prompt its length (``prefill``): the same at batch size 1, and independent
            of what else is in the batch and of how many tokens a call verifies.
    """

    def __init__(self, config: RopeConfig, device: torch.device | str = "cpu") -> None:
        self._config = config._for_transformers()
        self.rope_type: str = config.rope_type
        with torch.device("cpu"):
            inv_freq, attention_factor = self._frequencies()
        self.attention_factor = float(attention_factor)
        self.inv_freq: Tensor = inv_freq.to(device)
        self.position_dependent = self.rope_type in ("dynamic", "longrope")
        # position p uses row clamp(p - _last_short, 0, rows - 1) of the table
        self._last_short = config.max_position_embeddings - 1
        self._table = self.inv_freq[None]
        if self.rope_type == "longrope":
            self._last_short = int(self._config.rope_parameters["original_max_position_embeddings"]) - 1
            self._extend(2)

    @property
    def device(self) -> torch.device:
        return self.inv_freq.device

    @property
    def head_dim(self) -> int:
        return 2 * self.inv_freq.shape[0]

    def to(self, device: torch.device | str) -> Rope:
        """Moves the frequencies to `device`, in place; returns self."""
        self.inv_freq = self.inv_freq.to(device)
        self._table = self._table.to(device)
        return self

    def reserve(self, length: int) -> None:
        """Computes what ``rows`` and ``prefill`` need for the positions below `length`.

        Call it with the cache capacity ``S`` before decoding; a captured graph must not see the table replaced.
        """
        if self.rope_type == "dynamic":
            self._extend(length - self._last_short)

    def prefill(self, length: int) -> Tensor:
        """Frequencies ``[D/2]`` float32 of every token of a prompt with `length` tokens."""
        if length < 1:
            raise ValueError(f"length={length}: a prompt has at least 1 token")
        if not self.position_dependent:
            return self.inv_freq
        self.reserve(length)
        return self._table[min(max(length - 1 - self._last_short, 0), len(self._table) - 1)]

    def rows(self, positions: Tensor, *, out: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Frequencies ``[B, T, D/2]`` float32 for the `positions` ``[B, T]`` int32 of decoding windows.

        `out` ``[B, T, D/2]`` float32 contiguous and `index` ``[B, T]`` int32 contiguous (scratch) make the call free of
        allocations. Nothing is read back from the device, so positions must be below the length given to ``reserve``.
        """
        if out is None:
            out = self._table.new_empty((*positions.shape, self._table.shape[1]))
        index = torch.sub(positions, self._last_short, out=index)
        index.clamp_(0, len(self._table) - 1)
        torch.index_select(self._table, 0, index.view(-1), out=out.view(-1, self._table.shape[1]))
        return out

    def _frequencies(self, **length: Tensor) -> tuple[Tensor, float]:
        """Frequencies [D/2] of a sequence of this length (`seq_len`), and the attention factor."""
        if self.rope_type == "default":
            exponents = torch.arange(0, self._config.head_dim, 2, dtype=torch.float) / self._config.head_dim
            return 1.0 / self._config.rope_parameters["rope_theta"] ** exponents, 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return ROPE_INIT_FUNCTIONS[self.rope_type](self._config, torch.device("cpu"), **length)

    def _extend(self, rows: int) -> None:
        have = len(self._table)
        if rows <= have:
            return
        # one call per length with a tensor, as transformers does while decoding: a vectorised power rounds differently
        with torch.device("cpu"):
            lengths = torch.arange(self._last_short + have + 1, self._last_short + rows + 1)
            new = torch.stack([self._frequencies(seq_len=length)[0] for length in lengths])
        self._table = torch.cat([self._table, new.to(self._table)])
