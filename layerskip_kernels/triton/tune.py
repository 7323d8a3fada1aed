"""Times configurations of the Triton kernels on the GPU at hand and writes the best into the table of `configs`.

    python -m layerskip_kernels.triton.tune                              the shapes of SHAPES, bfloat16
    python -m layerskip_kernels.triton.tune --shape llama-3-8b --dtype float16 --output configs.json

From each op's own heuristic it changes one setting at a time, keeps what is faster, and stops when a round over all
settings brings nothing. A configuration counts only if its result agrees with the heuristic's and a row has the same
bits alone and among others. Calls are timed in CUDA graphs, over weights or caches that rotate through more memory than
the L2 cache holds. Settings are chosen per shape, never per number of rows: see `configs`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from layerskip_kernels.triton import configs

SHAPES = {
    "smollm2-135m": dict(C=576, I=1536, H=9, G=3, D=64, V=49152),
    "llama-3.2-1b": dict(C=2048, I=8192, H=32, G=8, D=64, V=128256),
    "llama-3-8b": dict(C=4096, I=14336, H=32, G=8, D=128, V=128256),
    "llama-2-7b": dict(C=4096, I=11008, H=32, G=32, D=128, V=32000),
    "qwen3-8b": dict(C=4096, I=12288, H=32, G=8, D=128, V=151936),
}
ROTATED_BYTES = 256 << 20  # more than any L2 cache
LINEAR = dict(BLOCK_N=(16, 32, 64, 128), BLOCK_K=(32, 64, 128, 256), num_warps=(2, 4, 8), num_stages=(2, 3, 4, 5))
CHOICES = {
    "small_linear": LINEAR,
    "exit_head": LINEAR,
    "verify_attention": dict(
        BLOCK_N=(16, 32, 64), SLOTS=(16, 32, 64, 128), MIN_CHUNK=(64, 128), BLOCK_M=(16, 32), num_warps=(4, 8),
        num_stages=(2, 3, 4),
    ),
}  # fmt: skip


class Workload(NamedTuple):
    """What one row of the table is chosen for."""

    op: str
    sizes: dict[str, int]  # of its shape class
    start: dict[str, int]  # the heuristic's settings
    calls: list[list[Callable[[], torch.Tensor]]]  # per number of rows: the same call on rotating data
    rows_agree: Callable[[], bool]  # a row's bits alone and among others


def rotated(make: Callable[[], object], bytes_each: int) -> list:
    return [make() for _ in range(max(1, min(64, -(-ROTATED_BYTES // bytes_each))))]


def linear_start(columns: int, x: torch.Tensor) -> dict[str, int]:
    """Stages as for the most products: each has rows of x in shared memory, and a row of the table serves all."""
    from layerskip_kernels.triton.launch import num_sms
    from layerskip_kernels.triton.linear_tile import MAX_TILES, tile_config

    one, most = (tile_config(columns, x.shape[1], x.dtype, num_sms(x), tiles) for tiles in (1, MAX_TILES))
    return {**one, "num_stages": most["num_stages"]}


def linear(dtype: torch.dtype, columns: int, width: int, device: str) -> Workload:
    from layerskip_kernels.triton.small_linear import small_linear

    weights = rotated(
        lambda: torch.randn(columns, width, dtype=dtype, device=device) / width**0.5, columns * width * dtype.itemsize
    )
    x = torch.randn(64, width, dtype=dtype, device=device)
    return Workload(
        "small_linear",
        dict(C=width, N=columns),
        linear_start(columns, x),
        [[lambda w=w, m=m: small_linear(x[:m], w) for w in weights] for m in (1, 8, 64)],
        lambda: torch.equal(small_linear(x[:1], weights[0])[0], small_linear(x, weights[0])[0]),
    )


def head(dtype: torch.dtype, vocab: int, width: int, device: str) -> Workload:
    from layerskip_kernels.triton.exit_head import exit_head

    heads = rotated(
        lambda: torch.randn(vocab, width, dtype=dtype, device=device) / width**0.5, vocab * width * dtype.itemsize
    )
    hidden, norm = torch.randn(64, width, dtype=dtype, device=device), torch.ones(width, dtype=dtype, device=device)
    return Workload(
        "exit_head",
        dict(C=width, N=vocab),
        linear_start(vocab, hidden),
        [[lambda w=w, m=m: exit_head(hidden[:m], norm, w, eps=1e-5).logprob for w in heads] for m in (1, 8, 16)],
        lambda: torch.equal(
            exit_head(hidden[:1], norm, heads[0], eps=1e-5).logprob[0],
            exit_head(hidden, norm, heads[0], eps=1e-5).logprob[0],
        ),
    )


def attention(dtype: torch.dtype, heads: int, groups: int, dim: int, device: str) -> Workload:
    from layerskip_kernels.triton.verify_attention import choose, verify_attention

    calls = []
    for batch, window, context in ((1, 1, 1024), (1, 7, 4096), (1, 7, 16384), (16, 1, 2048), (16, 7, 2048)):
        shape = (batch, groups, context + window, dim)
        caches = rotated(
            lambda shape=shape: [torch.randn(shape, dtype=dtype, device=device) for _ in "kv"],
            2 * math.prod(shape) * dtype.itemsize,
        )
        q = torch.randn(batch, window, heads, dim, dtype=dtype, device=device)
        where = dict(lengths=torch.full((batch,), context, dtype=torch.int32, device=device), scale=dim**-0.5)
        calls.append([lambda c=c, q=q, where=where: verify_attention(q, *c, **where) for c in caches])

    def rows_agree() -> bool:
        last = dict(lengths=where["lengths"] + window - 1, scale=where["scale"])
        return torch.equal(calls[-1][0]()[:, -1], verify_attention(q[:, -1:], *caches[0], **last)[:, 0])

    return Workload(
        "verify_attention", dict(D=dim, G=groups, H=heads), choose(heads, groups, dim, dtype), calls, rows_agree
    )


def workloads(shape: Mapping[str, int], dtype: torch.dtype, device: str):
    """The table's rows for a model, made one after the other: their data need not fit into memory together."""
    c, i, h, g, d = (shape[name] for name in "CIHGD")
    for columns, width in dict.fromkeys([((h + 2 * g) * d, c), (c, h * d), (2 * i, c), (c, i)]):
        yield linear(dtype, columns, width, device)
    yield head(dtype, shape["V"], c, device)
    yield attention(dtype, h, g, d, device)


def search(
    start: Mapping[str, int], choices: Mapping[str, tuple[int, ...]], measure: Callable[[dict[str, int]], float | None]
) -> tuple[dict[str, int], float]:
    """Settings with the least `measure` (None: they don't work) that changes of one setting at a time lead to."""
    best, seen = dict(start), {}

    def seconds(settings: dict[str, int]) -> float:
        key = tuple(sorted(settings.items()))
        if key not in seen:
            result = measure(settings)
            seen[key] = math.inf if result is None else result
        return seen[key]

    if math.isinf(seconds(best)):
        raise RuntimeError(f"the heuristic's own settings do not work: {best}")
    while True:
        before = best
        for name, values in choices.items():
            best = min((best, *({**best, name: value} for value in values)), key=seconds)
        if best == before:
            return best, seen[tuple(sorted(best.items()))]


@contextmanager
def trial(device: str, workload: Workload, dtype: torch.dtype, settings: Mapping[str, int]):
    """Within the block the op runs with `settings`."""
    rows = configs.table().setdefault(device, {}).setdefault(workload.op, {})
    name = configs.shape_class(dtype, **workload.sizes)
    before = rows.get(name)
    rows[name] = dict(settings)
    configs._row.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del rows[name]
        else:
            rows[name] = before
        configs._row.cache_clear()


def graph_seconds(calls: list[Callable[[], torch.Tensor]]) -> float:
    """Of one call; median of replays of a CUDA graph of at least 20."""
    turn = list(itertools.islice(itertools.cycle(calls), -(-20 // len(calls)) * len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turn:
            call()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(turn))
    return statistics.median(times[2:])


def measurer(workload: Workload, dtype: torch.dtype, device: str, seconds=graph_seconds):
    """The `measure` of `search`: geometric mean over the workload's numbers of rows."""
    from triton.runtime.errors import OutOfResources

    expected = [calls[0]().float() for calls in workload.calls]  # with the settings of each number of rows
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]

    def measure(settings: dict[str, int]) -> float | None:
        if settings.get("MIN_CHUNK", 0) % settings.get("BLOCK_N", 1):
            return None
        with trial(device, workload, dtype, settings):
            try:
                actual = [calls[0]().float() for calls in workload.calls]
                agree = workload.rows_agree()
            except OutOfResources as error:
                print(f"    {settings}: {error}", flush=True)
                return None
            close = all(torch.allclose(a, e, rtol=tolerance, atol=tolerance) for a, e in zip(actual, expected))
            if not close or not agree:
                print(f"    {settings}: {'a row depends on others' if close else 'wrong results'}", flush=True)
                return None
            result = math.exp(statistics.mean(math.log(seconds(calls)) for calls in workload.calls))
        print(f"    {settings}: {result * 1e6:.1f} us", flush=True)
        return result

    return measure


def write(table: Mapping, path: Path) -> None:
    """The whole file or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m layerskip_kernels.triton.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="a model's shapes; may be repeated (all)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--op", action="append", choices=CHOICES, help="only this op; may be repeated")
    parser.add_argument("--output", type=Path, default=configs.PATH, help=f"the table to write ({configs.PATH})")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: torch finds no CUDA device; run it on the GPU to tune for", file=sys.stderr)
        return 2
    dtype, name = getattr(torch, options.dtype), torch.cuda.get_device_name()
    chosen: dict[str, dict[str, dict[str, int]]] = {}
    for shape in options.shape or SHAPES:
        for workload in workloads(SHAPES[shape], dtype, "cuda"):
            row = configs.shape_class(dtype, **workload.sizes)
            if (options.op and workload.op not in options.op) or row in chosen.get(workload.op, {}):
                continue
            print(f"{shape}: {workload.op} {row}", flush=True)
            best, seconds = search(workload.start, CHOICES[workload.op], measurer(workload, dtype, name))
            chosen.setdefault(workload.op, {})[row] = best
            print(f"  best {best}: {seconds * 1e6:.1f} us", flush=True)
            table = json.loads(options.output.read_text()) if options.output.exists() else {}
            for op, rows in chosen.items():
                table.setdefault(name, {}).setdefault(op, {}).update(rows)
            write(table, options.output)  # after each row, so that an interrupted run keeps what it found
    return 0


if __name__ == "__main__":
    sys.exit(main())
