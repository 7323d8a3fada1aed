"""benchmarks/conftest.py: a run that is interrupted leaves the rows it has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = """
import time

import pytest


@pytest.mark.parametrize("interrupted", [False, True])
def bench_rms_norm(row, backend, interrupted):
    def call():
        if interrupted:
            raise KeyboardInterrupt
        time.sleep(1e-4)

    row([call], bytes_moved=1)
"""


def test_interrupted(tmp_path):
    for name in ("conftest.py", "bandwidth.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path)
    (tmp_path / "bench_rms_norm.py").write_text(BENCHMARKS)
    figures = tmp_path / "figures.json"
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # which turns benchmarks off
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            ROOT / "pyproject.toml",
            "-k",
            "cpu",
            f"--benchmark-json={figures}",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        env=alone,
    )
    assert result.returncode == 2 and "1 passed" in result.stdout, result.stdout + result.stderr  # 2: interrupted
    assert result.stdout.count("GB/s of") == 1
    (row,) = json.loads(figures.read_text())["benchmarks"]
    assert row["params"]["interrupted"] is False and row["stats"]["median"] > 1e-4
