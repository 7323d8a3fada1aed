"""Read bandwidth, to hold a row's bytes per second against."""

import time

import torch


def read_bandwidth(data: torch.Tensor, repeats: int = 4) -> float:
    """Bytes per second of summing `data`, which should be larger than the caches: the best of `repeats`."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        data.sum().item()
        times.append(time.perf_counter() - started)
    return data.nbytes / min(times)
