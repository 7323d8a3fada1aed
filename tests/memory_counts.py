"""How the kernels use memory at the sizes of a 1B model, counted while their PTX runs on the CPU.

    python tests/memory_counts.py cuda PATH_OF_MODULE | triton ARCH

Prints {case: {kernel: {"global" | "shared": [cost, least]}}} as JSON: how many sectors of 32 bytes, and how many cycles
of shared memory, the accesses take, and the least that their bytes need (tests/native/cuda_shim/memory_counts.h).
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

C, I, H, G = 2048, 8192, 32, 8  # noqa: E741


def cases() -> Iterator[tuple[str, Callable]]:
    from layerskip_kernels import ops

    def x(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([500], dtype=torch.int32)
    for m in (1, 5):
        qkv, gate_up, down = [x(256, C), x(64, C)], [x(256, C), x(256, C)], x(128, I)
        yield f"rms_norm M={m}", partial(ops.rms_norm, x(m, C), x(C), 1e-5, residual=x(m, C))
        yield f"swiglu M={m}", partial(ops.swiglu, x(m, I), x(m, I))
        yield f"small_linear M={m}", partial(ops.small_linear, x(m, C), qkv, norm=(x(C), 1e-5))
        yield f"small_linear gate M={m}", partial(ops.small_linear, x(m, C), gate_up, swiglu=True)
        yield f"small_linear down M={m}", partial(ops.small_linear, x(m, I), down, residual=x(m, 128))
        yield f"exit_head N={m}", partial(ops.exit_head, x(m, C), x(C), x(1024, C), eps=1e-5)
    for t, d in ((1, 64), (5, 128)):
        q, cache, new = x(1, t, H, d), x(2, 1, G, 600, d), x(2, 1, t, G, d)
        where = dict(positions=lengths[:, None] + torch.arange(t, dtype=torch.int32), inv_freq=torch.rand(d // 2))
        yield f"rope_append T={t} D={d}", partial(ops.rope_append, q, *new, *cache, lengths=lengths, **where)
        yield f"verify_attention T={t} D={d}", partial(ops.verify_attention, q, *cache, lengths=lengths, scale=0.1)
    path, keep = torch.tensor([[0, 2, 4, 1, 3]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    yield "kv_rollback", partial(ops.kv_rollback, *x(2, 4, 1, G, 600, 64), lengths, keep, path=path, window=5)


def counted(library: ctypes.CDLL) -> dict[str, dict[str, list[int]]]:
    with tempfile.NamedTemporaryFile() as file:
        library.write_memory_counts(file.name.encode())
        rows = [line.split() for line in Path(file.name).read_text().splitlines()]
    found: dict[str, dict[str, list[int]]] = {}
    for kernel, _, shared, _, cost, least in rows:
        sums = found.setdefault(kernel, {}).setdefault("shared" if shared == "1" else "global", [0, 0])
        sums[0] += int(cost)
        sums[1] += int(least)
    return found


def main(backend: str, of: str) -> None:
    if backend == "cuda":
        import cuda_shim

        cuda_shim.install(of)
        module = ctypes.CDLL(of)
        libraries = lambda: [module]  # noqa: E731
    else:
        import triton_ptx

        triton_ptx.install(int(of))
        libraries = triton_ptx.LOADED.values

    import layerskip_kernels as lk

    report = {}
    with lk.use_backend(backend):
        for name, call in cases():
            call()  # libraries of kernels are loaded
            for library in libraries():
                library.count_memory(True)
            call()
            report[name] = {}
            for library in libraries():
                library.count_memory(False)
                report[name] |= counted(library)
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
