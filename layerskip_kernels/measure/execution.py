"""Runs code that a model wrote against HumanEval's tests, in a process of its own with limits.

That is protection against accidents, not against malice: run nothing of a model you do not trust outside a container.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

SECONDS = 5
MEMORY = 1 << 30  # bytes of address space

# runs in the child before the program: exec keeps the limits
_LIMITED = """
import resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "__main__"})
print(sys.argv[3])
"""


def passes(record: dict[str, Any], completion: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether a HumanEval problem's tests pass on its prompt continued by `completion`."""
    program = f"{record['prompt']}{completion}\n{record['test']}\ncheck({record['entry_point']})\n"
    done = "passed all tests"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", _LIMITED, str(seconds), str(memory), done]
        try:
            result = subprocess.run(
                command,
                input=program.encode(),
                capture_output=True,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                timeout=seconds,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    # an early exit with code 0 is no pass: the last line says that the tests were reached
    return result.returncode == 0 and result.stdout.decode(errors="replace").endswith(done + "\n")
