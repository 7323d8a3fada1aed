from __future__ import annotations

import math

import torch

from layerskip_kernels import memory
from layerskip_kernels.models.config import ModelConfig


class KVCache:
    """Keys and values of every layer, [L, slots, G, S, D] each, allocated once and never initialised.

    What lies behind a sequence's length is never read as data, so slots are reused without clearing.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, slots, config.num_kv_heads, capacity, config.head_dim)
        try:
            self.k, self.v = (memory.empty(shape, dtype, device) for _ in "kv")
        except (MemoryError, RuntimeError, TypeError) as error:  # TypeError: a size that does not fit in 64 bits
            size = 2 * math.prod(shape) * dtype.itemsize // 2**30 + 1
            raise MemoryError(
                f"max_batch_size={slots}: a KV cache of {capacity} positions for each sequence needs {size} GiB, "
                f"which {device} does not have"
            ) from error

        self._ranges: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def layers(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of layers [first, last)."""
        if (first, last) not in self._ranges:
            self._ranges[first, last] = self.k[first:last], self.v[first:last]
        return self._ranges[first, last]

    def load(self, slot: int, past: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """Put K and V of positions before `length` into a slot: of each layer [G, n, D] for its last n <= length."""
        for layer, (k, v) in enumerate(past):
            self.k[layer, slot, :, length - k.shape[1] : length] = k
            self.v[layer, slot, :, length - v.shape[1] : length] = v

    @torch.inference_mode(False)
    def read(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of K and V of a slot's first positions, [L, G, length, D] each."""
        return self.k[:, slot, :, :length].clone(), self.v[:, slot, :, :length].clone()

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[3]
