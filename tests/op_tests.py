"""The ops' own tests on kernels that were made for a GPU and run on the CPU.

What stands in for the GPU takes its place when a process starts: the tests run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PRODUCTS = ("small_linear", "exit_head", "exit_head_penalty")
ATTENTION = ("verify_attention", "rope_append")
OTHERS = ("rms_norm", "swiglu", "kv_rollback", "verify_tokens", "verify_rejection", "kernels_decode")
GROUPS = {  # backend -> group -> names of test files
    "cuda": {"products": PRODUCTS, "others": (*ATTENTION, *OTHERS, "decode_glue")},
    "triton": {
        "products": PRODUCTS,
        "attention": (*ATTENTION, "triton_attention"),
        "others": (*OTHERS, "early_exit_cross_entropy", "triton_draw", "triton_library", "triton_philox"),
    },
}

LIMITS = {"global": 1.1, "shared": 1.3}


def pass_tests(backend: str, group: str, environment: dict[str, str], *options: str) -> None:
    files = [f"tests/test_{name}.py" for name in GROUPS[backend][group]]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend", backend, *options, *files],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout


def use_memory_well(backend: str, of: str, limits: dict[str, dict[str, float]]) -> None:
    """No kernel takes many more sectors, or cycles of shared memory, than its bytes need (memory_counts.py).

    limits: kernel -> {"global" | "shared": cost / least}, where others than LIMITS hold.
    """
    command = [sys.executable, "tests/memory_counts.py", backend, of]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert len(report) > 10 and all(report.values())
    for case, kernels in report.items():
        for kernel, counts in kernels.items():
            (known,) = [known for name, known in limits.items() if name in kernel] or [{}]
            for space, (cost, least) in counts.items():
                assert cost <= {**LIMITS, **known}[space] * least, f"{case}, {kernel}: {space} {cost}, {least} would do"


def files_of(backend: str) -> set[str]:
    return {name for names in GROUPS[backend].values() for name in names}
