"""Peak memory of the early-exit loss, forward and backward, against torch's own cross entropy of the same exits.

    pytest benchmarks/bench_early_exit_cross_entropy.py

On the CPU each measurement is a process of its own: the growth of its resident set over what the inputs take. On a GPU
the allocator's peak and the time of a step, in Llama-3.2-1B's shapes.
"""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from layerskip_kernels.ops import early_exit_cross_entropy

VOCAB, WIDTH, EXITS, TOKENS = 128_000, 128, 4, 512
SCRIPT = """
import json, resource, sys, time
import torch
from torch.nn.functional import cross_entropy
from layerskip_kernels.ops import early_exit_cross_entropy

name, dtype, vocab, width, exits, tokens = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(hiddens, head, targets):
    if name == "chunked":
        loss = early_exit_cross_entropy(hiddens, head, targets, [1 / exits] * exits).loss
    else:
        loss = sum(cross_entropy((h @ head.T).float(), targets) / exits for h in hiddens)
    loss.backward()
    return loss.item()

def inputs(vocab, tokens):
    torch.manual_seed(0)
    hiddens = [torch.randn(tokens, width, dtype=dtype, requires_grad=True) for _ in range(exits)]
    return hiddens, torch.randn(vocab, width).mul_(0.1).to(dtype).requires_grad_(), torch.randint(0, vocab, (tokens,))

step(*inputs(16, 4))  # libraries loaded
arguments = inputs(vocab, tokens)
before, started = peak(), time.perf_counter()
loss = step(*arguments)
print(json.dumps(dict(bytes=peak() - before, seconds=time.perf_counter() - started, loss=loss)))
"""


def measure(name: str, dtype: str) -> dict:
    command = [sys.executable, "-c", SCRIPT, name, dtype, *map(str, (VOCAB, WIDTH, EXITS, TOKENS))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("dtype", ["float32"])  # bfloat16 too, but torch's own takes minutes without AVX-512
def bench_early_exit_cross_entropy(benchmark, dtype):
    plain = measure("plain", dtype)
    chunked = benchmark.pedantic(lambda: measure("chunked", dtype), rounds=1)
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=2e-3)
    info = dict(
        peak_megabytes=round(chunked["bytes"] / 1e6),
        plain_peak_megabytes=round(plain["bytes"] / 1e6),
        memory_ratio=round(plain["bytes"] / chunked["bytes"], 2),
        seconds=round(chunked["seconds"], 2),
        plain_seconds=round(plain["seconds"], 2),
    )
    benchmark.extra_info.update(info)
    print(dtype, json.dumps(info))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2048, 8192])
def bench_early_exit_cross_entropy_on_gpu(benchmark, backend, device, tokens, vocab=128256, width=2048, exits=3):
    torch.manual_seed(0)
    hiddens = [
        torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(exits)
    ]
    head = (torch.randn(vocab, width, device=device) / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=device)

    def torchs_loss():
        return sum(cross_entropy((h @ head.T).float(), targets) / exits for h in hiddens)

    def step():
        ours = backend != "torch"
        loss = early_exit_cross_entropy(hiddens, head, targets, [1 / exits] * exits).loss if ours else torchs_loss()
        loss.backward()
        for tensor in (*hiddens, head):
            tensor.grad = None
        torch.cuda.synchronize()
        return loss.item()

    with torch.no_grad():
        expected = torchs_loss().item()
    assert step() == pytest.approx(expected, rel=2e-3)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
    peak = torch.cuda.max_memory_allocated() - before
    benchmark.extra_info.update(peak_megabytes=round(peak / 1e6), gpu=torch.cuda.get_device_name())
