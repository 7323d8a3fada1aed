"""`decode.glue` in a kernel each: torch's small ones would be barriers between launches that overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address
from layerskip_kernels.native.tensor import dtype_code

if TYPE_CHECKING:
    from layerskip_kernels.decode.buffers import Round


def embed(table: Tensor, tokens: Tensor, out: Tensor) -> None:
    """See layerskip_kernels.decode.glue."""
    launch.run(
        "embed",
        _cuda.embed,
        (table, tokens),
        tokens.data_ptr(),  # any stride: it is passed on
        tokens.stride(0),
        address(table, "table"),
        table.stride(0),
        address(out, "out"),
        out.stride(0),
        *out.shape,
        dtype_code(table, "table"),
    )


def begin_round(r: Round) -> None:
    """See layerskip_kernels.decode.glue."""
    repeated = r.repeated if r.sampled else ()
    launch.run(
        "begin_round",
        _cuda.begin_round,
        (r.tokens,),
        address(r.pending, "pending"),
        address(r.lengths, "lengths"),
        address(r.remaining, "remaining"),
        address(r.tokens, "tokens"),
        address(r.positions, "positions"),
        address(r.step_lengths, "step_lengths"),
        address(r.num_draft, "num_draft"),
        address(r.next_positions, "next_positions") if r.sampled else 0,
        [(address(a, "setting"), address(b, "repeated setting"), a.element_size()) for a, b in repeated],
        *r.tokens.shape,
    )


def end_round(r: Round) -> None:
    """See layerskip_kernels.decode.glue."""
    launch.run(
        "end_round",
        _cuda.end_round,
        (r.verified.tokens,),
        address(r.verified.tokens, "tokens"),
        address(r.verified.num_emitted, "num_emitted"),
        address(r.remaining, "remaining"),
        address(r.pending, "pending"),
        *r.verified.tokens.shape,
    )
