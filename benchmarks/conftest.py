"""Rows of pytest-benchmark with bytes per second beside the time, and the share of the bandwidth measured around them.

    pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-json=results.json

Every result is compared with the reference before it is timed. Working sets rotate through more memory than the caches
hold. Bandwidth of shared machines wanders, so it is probed before and after each row, and the mean of both counts.

A benchmark that takes `device` beside `backend` runs on the GPU too, where there is one: on its backends, and on
"torch", torch's own way to the same result, unless the module says TORCH = False. There a row is a CUDA graph of the
calls: Python's launches don't count, and those of our kernels overlap, as in a round of decoding.
"""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from bandwidth import read_bandwidth

import layerskip_kernels as lk
from layerskip_kernels import registry
from layerskip_kernels.native.cuda import launch

PROBE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
ROTATED_BYTES = {"cpu": 192 << 20, "cuda": 512 << 20}  # more than the last-level cache
GRAPH_CALLS = 100  # at least so many in a graph: its launch costs about 10 microseconds
GPU_BACKENDS = ("cuda", "triton", "torch")


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    gpu = torch.cuda.is_available() and "device" in metafunc.fixturenames
    op = metafunc.module.__name__.removeprefix("bench_")
    torch_too = getattr(metafunc.module, "TORCH", True)
    found = [b for b in GPU_BACKENDS if gpu and (torch_too if b == "torch" else _runs(b, op))]
    on_cpu = [] if metafunc.definition.get_closest_marker("gpu") else ["cpu"]
    choices = [*on_cpu, *(pytest.param(b, marks=pytest.mark.gpu) for b in found)]
    metafunc.parametrize("backend", choices, indirect=True)


def _runs(backend: str, op: str) -> bool:
    return registry.why_not(backend, op, torch.device("cuda"), torch.bfloat16) is None


@pytest.fixture
def backend(request):
    with lk.use_backend("auto" if request.param == "torch" else request.param):
        yield request.param


@pytest.fixture
def device(backend) -> str:
    """Where the benchmark's tensors live."""
    return "cpu" if backend == "cpu" else "cuda"


@pytest.fixture(scope="session")
def probe():
    """Read bandwidth in bytes per second: the best of a few sums over a large tensor."""
    data = {}

    def measure(device: str = "cpu") -> float:
        if device not in data:
            data[device] = torch.ones(PROBE_BYTES[device] // 4, device=device)
        return read_bandwidth(data[device])

    return measure


@pytest.fixture
def row(benchmark, probe):
    """`row(calls, bytes_moved)`: time the calls in turn, report bytes per second and the share of the bandwidth."""

    def run(calls, bytes_moved: int, device: str = "cpu") -> None:
        before = probe(device)
        try:
            if device == "cpu":
                turn, calls_per_round = itertools.cycle(calls), 1
                benchmark.pedantic(lambda: next(turn)(), rounds=max(10, 2 * len(calls)), warmup_rounds=len(calls))
            else:
                replay, calls_per_round = _graph(calls)
                benchmark.pedantic(replay, rounds=30, warmup_rounds=3)
        except KeyboardInterrupt:
            benchmark.has_error = True  # or pytest-benchmark would fail to write the rows there are
            raise
        bandwidth = statistics.mean((before, probe(device)))
        seconds = benchmark.stats.stats.median / calls_per_round
        rate = bytes_moved / seconds
        benchmark.extra_info.update(
            microseconds_per_call=round(seconds * 1e6, 2),
            gigabytes_per_second=round(rate / 1e9, 2),
            bandwidth_gigabytes_per_second=round(bandwidth / 1e9, 2),
            share_of_bandwidth=round(rate / bandwidth, 3),
        )
        if device == "cpu":
            benchmark.extra_info.update(threads=torch.get_num_threads())
        else:
            benchmark.extra_info.update(gpu=torch.cuda.get_device_name(), calls_per_graph=calls_per_round)

    return run


def _graph(calls):
    """A function that runs the calls in turn, from one CUDA graph, and waits; and how many calls that are."""
    calls = [*calls] * -(-GRAPH_CALLS // len(calls))
    for call in calls:  # compiles, and fills the allocator
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with launch.overlapping(), torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    return replay, len(calls)


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


def rotated(make, bytes_each: int, device: str = "cpu") -> list:
    """Several results of `make()`, together larger than the caches."""
    return [make() for _ in range(max(1, min(64, -(-ROTATED_BYTES[device] // bytes_each))))]


def assert_close(actual, expected, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.float().cpu(), expected.float().cpu(), rtol=tolerance, atol=tolerance)
