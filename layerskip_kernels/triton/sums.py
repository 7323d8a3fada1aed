"""Sums whose order is written down.

`tl.sum` adds in the order of the layout that the compiler picked, which changes with the number of warps, with what is
known about alignment, and with the kernel around it. Kernels whose results must agree to the bit add with these.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tree_sum(x):
    """Sum of x [a power of two]: neighbours are added, then neighbouring sums, and so on.

    Each `tl.sum` here has two terms, and two terms have one order: the same bits in every layout.
    """
    tl.static_assert(len(x.shape) == 1)
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x, axis=0)  # the one element that is left


def norm_block(columns: int) -> int:
    """BLOCK of `inverse_rms` for rows of `columns` elements. Part of the order: the same wherever rows are normed."""
    return min(1024, triton.next_power_of_2(columns))


@triton.jit
def inverse_rms(row_ptr, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(mean(row²) + eps): element i is added to partial sum i mod BLOCK, in increasing i, then `tree_sum`.

    The same bits in every kernel, with any number of warps.
    """
    partial = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        partial = tl.fma(x, x, partial)
    return tl.rsqrt(tl.div_rn(tree_sum(partial), COLUMNS * 1.0) + eps)  # `/` is approximate on GPUs
