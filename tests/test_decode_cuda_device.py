"""What rounds ask of a GPU, without one: captures, streams, devices and copies, of a pretended torch.cuda."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from layerskip_kernels.decode.graphs import CudaDevice
from layerskip_kernels.native.cuda import launch


class TwoDevices:
    """What `CudaDevice` uses of torch.cuda, as if there were two devices and the first was the current one."""

    Stream = staticmethod(lambda device: f"stream of {device}")
    current_stream = staticmethod(lambda device="cuda:0": f"current stream of {device}")
    CUDAGraph = staticmethod(lambda: SimpleNamespace(pool=lambda: "pool", replay=lambda: None))

    def __init__(self):
        self.current, self.capturing, self.captures, self.recorded, self.set_stream = "cuda:0", False, [], [], None

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert not self.capturing, "a capture began during another"
        self.capturing = True
        self.captures.append((self.current, stream, pool, torch.is_inference_mode_enabled()))
        yield
        self.capturing = False

    def Event(self):
        return SimpleNamespace(record=self.recorded.append, synchronize=lambda: None)


@pytest.fixture
def two_devices(monkeypatch):
    cuda = TwoDevices()
    for name in ("Stream", "current_stream", "CUDAGraph", "device", "graph", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(cuda, "set_stream", (cuda.current, stream)))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    return cuda


def test_after_a_failed_capture_the_stream_is_the_one_before(two_devices):
    """torch leaves it at the capture's when ending the capture fails too."""

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaDevice("cuda:1").capture(fails)
    assert two_devices.set_stream == ("cuda:1", "current stream of cuda:1")
    assert two_devices.current == "cuda:0"


def test_results_are_fetched_to_the_cpu_whatever_the_default_device(two_devices):
    with torch.device("meta"):
        copy = CudaDevice("cuda:0").fetch(torch.arange(3, device="cpu"))()
    assert copy.tolist() == [0, 1, 2]


@pytest.mark.parametrize("inference", [False, True])
def test_a_device_that_is_not_the_current_one(two_devices, inference):
    """Kernels go to the current stream of their device: the capture has to be that stream's."""
    modes = []
    device = CudaDevice("cuda:1")
    with torch.inference_mode(inference):
        for _ in range(2):
            device.capture(lambda: modes.append(torch.is_inference_mode_enabled()))
    assert two_devices.captures == [("cuda:1", "stream of cuda:1", pool, False) for pool in (None, "pool")]
    assert modes == [True, True]
    assert two_devices.current == "cuda:0"
    device.fetch(torch.arange(3))()
    assert two_devices.recorded == ["current stream of cuda:1"]


class Library:
    """In place of the CUDA library: whether this thread's launches overlap."""

    def __init__(self):
        self.overlap = False

    def overlap_launches(self, overlap):
        before, self.overlap = self.overlap, overlap
        return before


@pytest.mark.parametrize(("asked", "overlap"), [(None, True), ("1", True), ("0", False)])
def test_launches_overlap_in_captures_alone(two_devices, monkeypatch, asked, overlap):
    library, seen = Library(), []
    monkeypatch.setattr(launch, "cuda_library", lambda: (library, None))
    monkeypatch.delenv("LAYERSKIP_PDL", raising=False)
    if asked:
        monkeypatch.setenv("LAYERSKIP_PDL", asked)

    def fails():
        seen.append(library.overlap)
        raise RuntimeError("out of memory")

    device = CudaDevice("cuda:0")
    device.capture(lambda: seen.append(library.overlap))
    with pytest.raises(RuntimeError, match="out of memory"):
        device.capture(fails)
    assert seen == [overlap, overlap] and not library.overlap


def test_a_word_for_overlap_is_refused(two_devices, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_PDL", "yes")
    with pytest.raises(ValueError, match="LAYERSKIP_PDL=yes: choose 0 or 1"):
        CudaDevice("cuda:0").capture(lambda: None)


def test_captures_of_several_threads_exclude_each_other(two_devices):
    with ThreadPoolExecutor(4) as threads:
        captures = [threads.submit(CudaDevice("cuda:0").capture, lambda: time.sleep(0.02)) for _ in range(4)]
    for capture in captures:
        capture.result()
    assert len(two_devices.captures) == 4
