"""Rounds as CUDA graphs: all kernels of a round in one launch, and the host one round behind the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch

from layerskip_kernels.native.cuda import launch

# A capture begins by waiting for the whole device, which would break one that is under way in another thread.
_capturing = threading.Lock()


class CudaDevice:
    """What rounds need of a GPU, be it the current one or not, beyond its kernels. Tests put another in its place."""

    LAG = 1  # rounds that the host is behind

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # torch's own for captures is one for all devices
        self._pool = None

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """Records the kernels that `body` launches, without running them; returns what launches them all at once.

        All graphs use one pool of memory for their temporaries, since they never run side by side.
        """
        # other threads may allocate and run kernels meanwhile
        how = dict(pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        before = torch.cuda.current_stream(self.device)
        try:
            with (
                _capturing,
                torch.cuda.device(self.device),
                launch.overlapping(),
                # torch's random state for graphs, which the first capture makes, must serve graphs of others too
                torch.inference_mode(False),
                torch.cuda.graph(graph := torch.cuda.CUDAGraph(), **how),
                torch.inference_mode(),
            ):
                body()
        except BaseException:
            with torch.cuda.device(self.device):  # which set_stream would make the current one for good
                torch.cuda.set_stream(before)  # where ending the capture fails, torch stays on the capture's
            raise
        self._pool = graph.pool()
        return graph.replay

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts a copy to pinned memory, behind what was launched; returns what waits for it and gives it."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))

        def wait() -> torch.Tensor:
            done.synchronize()
            return copy

        return wait


class RoundGraphs:
    """Runs rounds over static tensors; from its second run on, a round is the replay of its graph.

    The first run loads kernels, which must not happen during a capture. Graphs hold addresses: a round's key must tell
    apart whatever has other tensors, or other numbers in its launches.
    """

    def __init__(self, device: CudaDevice):
        self.device = device
        self._replay: dict[Hashable, Callable[[], None] | None] = {}

    def run(self, key: Hashable, body: Callable[[], None]) -> None:
        """Does what `body()` does, which neither waits for the device nor reads from it."""
        if key not in self._replay:
            body()
            self._replay[key] = None
            return
        replay = self._replay[key]
        if replay is None:
            replay = self._replay[key] = self.device.capture(body)
        replay()
