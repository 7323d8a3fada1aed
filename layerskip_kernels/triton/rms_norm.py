"""Root-mean-square norm of each row, one program per row; with a residual, the sum is written first and read back.

The sum of squares has the order of `sums.inverse_rms`, whatever the row's neighbours, alignment or number of warps.

Bound by bytes: 2 · M · C · itemsize (4 with a residual), 4 operations an element. Expected on an H100 (3.35 TB/s), not
measured: M = 8, C = 4096, bfloat16: 0.13 MB, so the launch (about 2 µs) and one row's latency decide; M = 512,
C = 8192: 17 MB, 5 µs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerskip_kernels.triton.launch import (
    aligned,
    cast,
    check,
    follow_previous_kernels,
    guard,
    round_options,
    row_offset,
)
from layerskip_kernels.triton.sums import inverse_rms, norm_block


@triton.jit(do_not_specialize=["stride_x", "stride_residual", "stride_out"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    stride_x,
    stride_residual,
    stride_out,
    eps,
    COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow_previous_kernels(OVERLAP)
    row = tl.program_id(0)
    x_ptr += row_offset(row, stride_x, ALIGNED)
    out_ptr += row_offset(row, stride_out, ALIGNED)
    if HAS_RESIDUAL:
        residual_ptr += row_offset(row, stride_residual, ALIGNED)
        for start in range(0, COLUMNS, WHOLE):
            column = start + tl.arange(0, WHOLE)
            inside = column < COLUMNS
            x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
            total = tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32) + x
            tl.store(residual_ptr + column, cast(total, residual_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # other threads of the block may read it back
        x_ptr = residual_ptr
    scale = inverse_rms(x_ptr, eps, COLUMNS, BLOCK)
    for start in range(0, COLUMNS, WHOLE):
        column = start + tl.arange(0, WHOLE)
        inside = column < COLUMNS
        x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, cast(x * scale * weight, out_ptr.dtype.element_ty), mask=inside)


def whole_block(columns: int) -> int:
    """Columns of what is done element by element: all at once, or each load would wait for the store before it."""
    return min(8192, triton.next_power_of_2(columns))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See layerskip_kernels.ops.rms_norm."""
    rows, columns = x.shape
    if out is None:
        out = x.new_empty(rows, columns)
    check(x=x, weight=weight, residual=residual, out=out)
    if not out.numel():
        return out
    block = norm_block(columns)
    with guard(x):
        rms_norm_kernel[(rows,)](
            x,
            weight,
            residual,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            float(eps),
            COLUMNS=columns,
            HAS_RESIDUAL=residual is not None,
            ALIGNED=aligned(x, weight, residual, out),
            BLOCK=block,
            WHOLE=whole_block(columns),
            num_warps=max(1, block // 256),
            **round_options(x),
        )
    return out
