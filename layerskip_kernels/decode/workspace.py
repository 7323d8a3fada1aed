from __future__ import annotations

import torch

from layerskip_kernels.decode.batch import Batch
from layerskip_kernels.decode.buffers import Buffers
from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.graphs import CudaDevice, RoundGraphs
from layerskip_kernels.decode.model import Model
from layerskip_kernels.switches import switched_on


class Workspace:
    """What a decoder keeps from call to call: the cache, and by kind of round its tensors and graphs.

    So a call like an earlier one allocates nothing, and on a GPU replays the graphs that were captured then.
    """

    def __init__(self, model: Model, cache: KVCache):
        self.model, self.cache = model, cache
        self.batch = Batch(cache.slots, model.device, model.config.vocab_size)
        self.device = CudaDevice(model.device) if captures_rounds(model) else None
        self._rounds: dict[tuple[int, bool, bool], tuple[Buffers, RoundGraphs | None]] = {}
        self._eos_ids: dict[tuple[int, ...], torch.Tensor] = {}

    def rounds(
        self, drafts: int, *, sampled: bool, penalized: bool, logits: bool
    ) -> tuple[Buffers, RoundGraphs | None]:
        """Tensors, and where there is a GPU graphs, of rounds of up to `drafts` drafts."""
        kind = dict(sampled=sampled, penalized=penalized, logits=logits)
        if logits:  # [rows, K+1, V]: too large to keep
            return Buffers(self.model, self.batch, self.cache.slots, drafts, **kind), None
        key = drafts, sampled, penalized
        if key not in self._rounds:
            buffers = Buffers(self.model, self.batch, self.cache.slots, drafts, **kind)
            self._rounds[key] = buffers, self.device and RoundGraphs(self.device)
        return self._rounds[key]

    def eos_ids(self, ids: tuple[int, ...]) -> torch.Tensor:
        """They stay where they are, for the graphs that read them."""
        if ids not in self._eos_ids:
            self._eos_ids[ids] = torch.tensor(ids, dtype=torch.int64, device=self.model.device)
        return self._eos_ids[ids]


def captures_rounds(model: Model) -> bool:
    """Whether rounds become CUDA graphs. The reference's can't: it reads lengths on the host."""
    on_gpu = model.device.type == "cuda" and "reference" not in model.ops.backends.values()
    return on_gpu and switched_on("LAYERSKIP_GRAPHS")
