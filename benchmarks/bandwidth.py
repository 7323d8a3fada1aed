"""Read bandwidth, to hold a row's bytes per second against."""

import time

import torch


def read_bandwidth(data: torch.Tensor, repeats: int = 4) -> float:
    """Bytes per second of summing `data`, which should be larger than the caches: the best of `repeats`."""
    measure = _seconds_on_gpu if data.is_cuda else _seconds
    return data.nbytes / min(measure(data) for _ in range(repeats))


def _seconds(data: torch.Tensor) -> float:
    started = time.perf_counter()
    data.sum().item()
    return time.perf_counter() - started


def _seconds_on_gpu(data: torch.Tensor, sums: int = 10) -> float:
    """Between events, so that neither the launch nor the way back to the host is in it."""
    data.sum()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(sums):
        data.sum()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / sums
