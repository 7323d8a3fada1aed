"""The Triton kernels' production configurations, compiled for GPUs that need not be there.

No spills, shared memory within the part's limit, 16-byte loads and matrix instructions where the case asks for them,
and no specialisation of a kernel with another order of sums. The compiler runs in a process of its own, since
TRITON_INTERPRET in this one would turn it off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_kernels.triton import OPS

TESTS = Path(__file__).parent
ARCHS = {80, 90, 100}


def compiled(cases: str) -> list[dict]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, TESTS / "triton_compile.py", cases], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("op", sorted(OPS))
def test_compiles_well_for_every_architecture(op):
    rows = compiled(op)
    assert {row["arch"] for row in rows} == ARCHS
    assert not [(row["case"], row["arch"], row["problems"]) for row in rows if row["problems"]]


def test_the_checks_notice_bad_kernels():
    wrong = {
        "narrow": "no 16-byte load",
        "spills": "spills: STACK",
        "sums": "other arithmetic",
        "no dot": "no matrix",
        "mean": "it has div",
        "early": "does not wait",
    }
    for row in compiled("deliberately_bad"):
        if row["case"] == "sums" and row["arch"] != 90:  # specialisations are compared on one architecture
            continue
        if row["case"] == "early" and row["arch"] < 90:  # where nothing overlaps
            continue
        assert wrong[row["case"]] in " ".join(row["problems"]), row
