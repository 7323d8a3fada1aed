"""x @ Wᵀ + bias (+ residual) for few rows: every program reads its rows of W once, whatever M up to 64.

Grid: tiles of up to 64 rows of x (fastest, so that they find W in the L2 cache) by tiles of columns of all weights of
the list. No split over K: see linear_tile.py for why a row's sums don't depend on anything else. A norm in front is
the `rms_norm` kernel, launched first: fused and separate can't differ.

Bound by the bytes of W: N · C · itemsize; 2 · M · N · C operations, on matrix instructions. Expected on an H100
(3.35 TB/s, 989 TFLOP/s), not measured, bfloat16, M = 8: gate and up of an 8B model, N = 2 · 14336, C = 4096: 235 MB,
3.8 GFLOP (rows filled up to 16), 70 µs; o of a 1B model, N = C = 2048: 8.4 MB, 2.5 µs, about what a launch costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from layerskip_kernels.triton.configs import tuned
from layerskip_kernels.triton.launch import (
    cast,
    check,
    follow_previous_kernels,
    guard,
    num_sms,
    round_options,
    stride_unit,
)
from layerskip_kernels.triton.linear_tile import ROWS, products, row_tiles, tile_config
from layerskip_kernels.triton.rms_norm import rms_norm
from layerskip_kernels.triton.swiglu import swiglu as gated

MAX_WEIGHTS = 3  # of one launch
_ROWS = tl.constexpr(ROWS)
RUNTIME = (  # what varies between calls, or does not matter to the code
    *("rows", "stride_x", "n0", "n1", "n2", "stride_w0", "stride_w1", "stride_w2"),
    *("stride_out0", "stride_out1", "stride_out2", "stride_residual"),
)


@triton.jit(do_not_specialize=RUNTIME)
def small_linear_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, residual_ptr, out0_ptr, out1_ptr, out2_ptr,
    rows, stride_x, n0, n1, n2, stride_w0, stride_w1, stride_w2, stride_out0, stride_out1, stride_out2, stride_residual,
    C: tl.constexpr, COUNT: tl.constexpr, BIASES: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BIASES: bit i says whether weight i has a bias. stride_x and stride_w count units of UNIT elements."""
    follow_previous_kernels(OVERLAP)
    dtype: tl.constexpr = out0_ptr.dtype.element_ty
    n0, n1, n2 = n0.to(tl.int64), n1.to(tl.int64), n2.to(tl.int64)
    stride_w0, stride_w1, stride_w2 = stride_w0.to(tl.int64), stride_w1.to(tl.int64), stride_w2.to(tl.int64)
    stride_out0, stride_out1, stride_out2 = stride_out0.to(tl.int64), stride_out1.to(tl.int64), stride_out2.to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    w_ptr, bias_ptr, out_ptr, columns, stride_w, stride_out = w0_ptr, bias0_ptr, out0_ptr, n0, stride_w0, stride_out0
    begin, biased = tile * 0, n0 * (BIASES & 1)
    if COUNT > 1:
        end0 = tl.cdiv(n0, BLOCK_N)
        end1 = end0 + tl.cdiv(n1, BLOCK_N)
        if tile >= end0:
            w_ptr, bias_ptr, out_ptr = w1_ptr, bias1_ptr, out1_ptr
            columns, stride_w, stride_out = n1, stride_w1, stride_out1
            begin, biased = end0, n1 * (BIASES >> 1 & 1)
        if COUNT > 2:
            if tile >= end1:
                w_ptr, bias_ptr, out_ptr = w2_ptr, bias2_ptr, out2_ptr
                columns, stride_w, stride_out = n2, stride_w2, stride_out2
                begin, biased = end1, n2 * (BIASES >> 2 & 1)
    column = (tile - begin) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0).to(tl.int64) * (TILES * _ROWS)
    acc0, acc1, acc2, acc3 = products(
        x_ptr, stride_x, first, rows, w_ptr, stride_w, column, columns, C, TILES, BLOCK_K, UNIT
    )
    for product in tl.static_range(TILES):
        acc = acc0
        if product == 1:
            acc = acc1
        if product == 2:
            acc = acc2
        if product == 3:
            acc = acc3
        row = first + product * _ROWS + tl.arange(0, _ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        if BIASES != 0:
            bias = tl.load(bias_ptr + column, mask=column < biased, other=0.0).to(tl.float32)
            acc = tl.where(column[None, :] < biased, acc + bias[None, :], acc)
        y = cast(acc, dtype)
        if HAS_RESIDUAL:
            at = residual_ptr + row[:, None] * stride_residual + column[None, :]
            y = cast(tl.load(at, mask=inside, other=0.0).to(tl.float32) + y.to(tl.float32), dtype)
        tl.store(out_ptr + row[:, None] * stride_out + column[None, :], y, mask=inside)


def small_linear(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """See layerskip_kernels.ops.small_linear."""
    if swiglu:
        return gated(*small_linear(x, weights, bias=bias, norm=norm), out=out)
    single = isinstance(weights, Tensor)
    ws = [weights] if single else list(weights)
    biases = [bias] if single else [None] * len(ws) if bias is None else list(bias)
    if out is None:
        outs = [x.new_empty(x.shape[0], w.shape[0]) for w in ws]
    else:
        outs = [out] if single else list(out)
    if norm is not None:
        x = rms_norm(x, *norm)
    check(x=x, residual=residual)
    for w, b, o in zip(ws, biases, outs):
        check(weights=w, bias=b, out=o)
    if len(x):
        with guard(x):
            for i in range(0, len(ws), MAX_WEIGHTS):
                _launch(x, ws[i : i + MAX_WEIGHTS], biases[i : i + MAX_WEIGHTS], residual, outs[i : i + MAX_WEIGHTS])
    return outs[0] if single else outs


def _launch(x: Tensor, ws: list[Tensor], biases: list[Tensor | None], residual: Tensor | None, outs: list[Tensor]):
    rows, width = x.shape
    unit = stride_unit(x, *ws)
    tiles = row_tiles(rows, unit)
    columns = [len(w) for w in ws]
    total = sum(columns)
    config = tuned("small_linear", x, tile_config(total, width, x.dtype, num_sms(x), tiles), C=width, N=total)
    column_tiles = sum(triton.cdiv(n, config["BLOCK_N"]) for n in columns)
    if not column_tiles:
        return

    def three(values, filler):
        return (*values, *(filler for _ in range(MAX_WEIGHTS - len(values))))

    # Arguments that are not used are some pointer of the right dtype.
    small_linear_kernel[(triton.cdiv(rows, ROWS * tiles), column_tiles)](
        x,
        *three(ws, x),
        *three([x if b is None else b for b in biases], x),
        x if residual is None else residual,
        *three(outs, x),
        rows,
        x.stride(0) // unit,
        *three(columns, 0),
        *three([w.stride(0) // unit for w in ws], 0),
        *three([o.stride(0) for o in outs], 0),
        0 if residual is None else residual.stride(0),
        C=width,
        COUNT=len(ws),
        BIASES=sum(1 << i for i, b in enumerate(biases) if b is not None),
        HAS_RESIDUAL=residual is not None,
        TILES=tiles,
        UNIT=unit,
        **config,
        **round_options(x),
    )
