"""The Triton kernels as compiled for a GPU, on CPU tensors: the ops' own tests, run by their PTX (triton_ptx.py).

What the interpreter can't show: what the compiler makes of a kernel's arithmetic, and threads that wait for each other.
"""

import pytest
from op_tests import GROUPS, pass_tests, use_memory_well
from triton_ptx import VARIABLE

# Another dtype is another kernel to compile, and float16 takes the same path as bfloat16.
LEFT_OUT = ("-k", "not float16 or bfloat16")


@pytest.mark.parametrize("group", GROUPS["triton"])
def test_passes_its_tests(group):
    pass_tests("triton", group, {VARIABLE: "90"}, "-n", "2", *LEFT_OUT)


def test_memory_is_used_well():
    small = {"global": 1.6, "shared": 6.2}  # a few hundred accesses, whose layouts Triton chooses
    use_memory_well("triton", "90", {"merge": small, "rope": small})
