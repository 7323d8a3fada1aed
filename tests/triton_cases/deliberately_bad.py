"""Kernels that each fail one check of `triton_compile.problems`, to see that it is noticed."""

import triton
import triton.language as tl
from triton_compile import Case

from layerskip_kernels.triton.launch import follow_previous_kernels


@triton.jit(do_not_specialize=["stride"])
def copy_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    """The compiler can't know that rows are aligned, and loads element by element."""
    i = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@triton.jit
def sum_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    """`stride` is specialised, and with it the layout, and with that the order of the sum."""
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * stride + tl.arange(0, BLOCK))
    tl.store(out_ptr + row, tl.sum(x.to(tl.float32), axis=0))


@triton.jit
def spill_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """512 values in each thread of the one warp must outlive the sum over all of them."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x * tl.sum(x, axis=0))


@triton.jit
def mean_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """`/` need not round to the nearest."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr, tl.sum(x, axis=0) / 1000)


@triton.jit
def early_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """x may not have been written when it is read."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    follow_previous_kernels(OVERLAP)
    tl.store(out_ptr + tl.arange(0, BLOCK), x)


BF16 = dict(x_ptr="*bf16", out_ptr="*bf16")
CASES = [
    Case("narrow", copy_kernel, BF16 | dict(stride="i32"), dict(BLOCK=1024), ("x_ptr", "out_ptr"), wide=True),
    Case("no dot", copy_kernel, BF16 | dict(stride="i32"), dict(BLOCK=1024), ("x_ptr", "out_ptr"), mma=True),
    Case("sums", sum_kernel, BF16 | dict(stride="i32"), dict(BLOCK=1024), ("x_ptr", "stride")),
    Case("mean", mean_kernel, BF16, dict(BLOCK=1024), ("x_ptr",), without=r"div\.(approx|full)\S*"),
    Case("early", early_kernel, BF16, dict(BLOCK=1024), ("x_ptr", "out_ptr")),
    Case("spills", spill_kernel, dict(x_ptr="*fp32", out_ptr="*fp32"), dict(BLOCK=16384), num_warps=1),
]
