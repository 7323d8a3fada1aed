"""Rows of pytest-benchmark with bytes per second beside the time, and the share of the bandwidth measured around them.

    pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-json=results.json

Every result is compared with the reference before it is timed. Working sets rotate through more memory than the caches
hold. Bandwidth of shared machines wanders, so it is probed before and after each row, and the mean of both counts.
"""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch

import layerskip_kernels as lk

PROBE_BYTES = 256 << 20
ROTATED_BYTES = 192 << 20  # more than the last-level cache of a desktop or a slice of a server


@pytest.fixture(params=["cpu"])
def backend(request):
    with lk.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def probe():
    """Read bandwidth of all threads, bytes per second: the best of a few sums over a large tensor."""
    data = torch.ones(PROBE_BYTES // 4)

    def measure() -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            data.sum()
            times.append(time.perf_counter() - started)
        return PROBE_BYTES / min(times)

    return measure


@pytest.fixture
def row(benchmark, probe):
    """`row(calls, bytes_moved)`: time the calls in turn, report bytes per second and the share of the bandwidth."""

    def run(calls, bytes_moved: int) -> None:
        turn = itertools.cycle(calls)
        before = probe()
        benchmark.pedantic(lambda: next(turn)(), rounds=max(10, 2 * len(calls)), warmup_rounds=len(calls))
        bandwidth = statistics.mean((before, probe()))
        rate = bytes_moved / benchmark.stats.stats.median
        benchmark.extra_info.update(
            gigabytes_per_second=round(rate / 1e9, 2),
            bandwidth_gigabytes_per_second=round(bandwidth / 1e9, 2),
            share_of_bandwidth=round(rate / bandwidth, 3),
            threads=torch.get_num_threads(),
        )

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", ()) if "share_of_bandwidth" in b.extra_info]
    if rows:
        terminalreporter.section("bytes per second")
    for b in rows:
        info = b.extra_info
        terminalreporter.write_line(
            f"{b.name:70s} {info['gigabytes_per_second']:8.2f} GB/s of {info['bandwidth_gigabytes_per_second']:6.2f}"
            f"  {info['share_of_bandwidth']:6.1%}"
        )


def rotated(make, bytes_each: int) -> list:
    """Several results of `make()`, together larger than the caches."""
    return [make() for _ in range(max(1, min(64, -(-ROTATED_BYTES // bytes_each))))]


def assert_close(actual, expected, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
