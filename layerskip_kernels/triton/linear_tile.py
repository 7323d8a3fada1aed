"""What `small_linear` and `exit_head` share: rows of x times rows of W.

One program computes its columns over the whole of K, in steps of one matrix instruction (16 columns for half
precision), always with ROWS rows of x as its first operand. More rows are more such products on the same tile of W, in
the same program. So the order of every sum is that of K, whatever M, the tile, or the weights that share the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from layerskip_kernels.triton import launch

ROWS = 16  # of x in one product: the height of mma.sync
MAX_TILES = 4  # products that share a tile of W
_INTERPRETED = tl.constexpr(launch.INTERPRETED)
_ROWS = tl.constexpr(ROWS)


def row_tiles(rows: int, unit: int) -> int:
    """Products per program for `rows` rows of x: one where loads are not wide, which go through registers."""
    return 1 if rows <= ROWS or unit == 1 else 2 if rows <= 2 * ROWS else MAX_TILES


@triton.jit
def _product(acc, x_row, row, rows, k, w, C: tl.constexpr, BLOCK_K: tl.constexpr):
    inside = row[:, None] < rows
    if C % BLOCK_K != 0:
        inside = inside & (k[None, :] < C)
    x = tl.load(x_row + k[None, :], mask=inside, other=0.0)
    if _INTERPRETED:  # its tl.dot is wrong for bfloat16, and in an order that depends on the row: rows one by one
        every = tl.broadcast_to(w.to(tl.float32)[None, :, :], (_ROWS, BLOCK_K, w.shape[1]))
        return acc + tl.reshape(tl.dot(x.to(tl.float32)[:, None, :], every, input_precision="ieee"), acc.shape)
    else:
        return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def products(
    x_ptr, stride_x, first, rows, w_ptr, stride_w, column, columns,
    C: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows first, first + 1, … of x times rows `column` of W: up to four [ROWS, BLOCK_N] float32.

    Rows of x beyond `rows` count as zeros; columns beyond `columns` repeat the last one: no load of W needs a mask.
    The strides count units of UNIT elements: see `launch.stride_unit`.
    """
    row = first + tl.arange(0, _ROWS).to(tl.int64)
    x_row = x_ptr + row[:, None] * stride_x * UNIT
    x_tile = stride_x * UNIT * _ROWS
    w_row = w_ptr + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * stride_w * UNIT
    acc0 = tl.zeros((_ROWS, column.shape[0]), tl.float32)
    acc1 = tl.zeros((_ROWS, column.shape[0]), tl.float32)
    acc2 = tl.zeros((_ROWS, column.shape[0]), tl.float32)
    acc3 = tl.zeros((_ROWS, column.shape[0]), tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if C % BLOCK_K == 0:
            w = tl.load(w_row + k[None, :]).T
        else:
            w = tl.load(w_row + k[None, :], mask=k[None, :] < C, other=0.0).T
        acc0 = _product(acc0, x_row, row, rows, k, w, C, BLOCK_K)
        if TILES > 1:
            acc1 = _product(acc1, x_row + x_tile, row + _ROWS, rows, k, w, C, BLOCK_K)
        if TILES > 2:
            acc2 = _product(acc2, x_row + 2 * x_tile, row + 2 * _ROWS, rows, k, w, C, BLOCK_K)
            acc3 = _product(acc3, x_row + 3 * x_tile, row + 3 * _ROWS, rows, k, w, C, BLOCK_K)
    return acc0, acc1, acc2, acc3


def tile_config(columns: int, width: int, dtype: torch.dtype, sms: int, tiles: int) -> dict[str, int]:
    """Tile and launch options: enough programs for every multiprocessor, each with 16 KB of weights per step in flight.

    Only the number of warps and of stages, which no sum depends on, look at `tiles`.
    """
    warps, stages = 4 if tiles < MAX_TILES else 8, 4 if tiles == 1 else 3
    if launch.INTERPRETED:  # few steps: each costs the same, whatever its size
        block_n, block_k = 256, 256
    elif dtype == torch.float32:  # no matrix instruction keeps its digits, and plain ones need more registers
        block_n, block_k, warps = 32 if columns <= 2048 * 32 else 64, 32, 4
    elif columns > 2048 * 64:  # a vocabulary: `exit_head` merges as many partial results as there are tiles
        block_n, block_k = 128, 64
    elif columns >= 64 * sms:
        block_n, block_k = 64, 128
    elif columns >= 29 * sms:
        block_n, block_k, warps = 32, 256, 4
    else:
        block_n, block_k, warps = 16, 256, 2
    block_k = min(block_k, max(16, triton.next_power_of_2(width)))
    return dict(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages)
