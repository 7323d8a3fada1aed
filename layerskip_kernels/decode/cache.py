from __future__ import annotations

import torch

from layerskip_kernels.models.config import ModelConfig


class KVCache:
    """Keys and values of every layer, [L, slots, G, S, D] each, allocated once and never initialised.

    What lies behind a sequence's length is never read as data, so slots are reused without clearing.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, slots, config.num_kv_heads, capacity, config.head_dim)
        try:
            self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in "kv")
        except RuntimeError as error:
            size = 2 * torch.Size(shape).numel() * dtype.itemsize / 2**30
            raise MemoryError(
                f"max_batch_size={slots}: a KV cache of {capacity} positions for each sequence needs {size:.1f} GiB, "
                f"which {device} does not have"
            ) from error

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[3]
