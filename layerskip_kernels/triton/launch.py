"""What every launcher needs: the interpreter, checked tensors, the device guard, the compiler options."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from layerskip_kernels.native.tensor import address
from layerskip_kernels.switches import switched_on

INTERPRETED = knobs.runtime.interpret  # read where kernels are decorated, so fixed from here on
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
WIDE_BYTES = 16  # of the widest load
# Products and sums are rounded as written; what shall be fused says tl.fma. Triton's default differs between versions.
EXACT = {"enable_fp_fusion": False}

_ALONE = EXACT | {"OVERLAP": False}
_OVERLAPPING = EXACT | {"OVERLAP": True, "launch_pdl": True}
_INTERPRETED = tl.constexpr(INTERPRETED)
_NO_GUARD = contextlib.nullcontext()


def check(**tensors: Tensor | None) -> None:
    """TypeError or ValueError for what has no plain memory on this backend's device, or carries a gradient."""
    for name, tensor in tensors.items():
        if tensor is not None:
            address(tensor, name, DEVICE_TYPE)


def guard(tensor: Tensor):
    """Context in which kernels launch on the device of `tensor`."""
    if INTERPRETED or tensor.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(tensor.device)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every row (last dimension) of every tensor starts at a multiple of WIDE_BYTES.

    Pass the answer to kernels as a constexpr, and let no sum's order depend on it.
    """
    for tensor in tensors:
        if tensor is not None:
            size = tensor.element_size()
            if tensor.data_ptr() % WIDE_BYTES or any(s * size % WIDE_BYTES for s in tensor.stride()[:-1]):
                return False
    return True


def stride_unit(*tensors: Tensor) -> int:
    """Elements in 16 bytes when every row of the tensors starts at a multiple of that, else 1.

    Kernels get strides divided by it: what they multiply them with tells the compiler that loads can be wide, without
    a specialisation on the strides themselves.
    """
    return WIDE_BYTES // tensors[0].element_size() if aligned(*tensors) else 1


def num_sms(tensor: Tensor) -> int:
    """Multiprocessors of the device of `tensor`. Decides how many blocks share the work, never the order of a sum."""
    return 4 if INTERPRETED else _num_sms(tensor.get_device())


@functools.cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def round_options(tensor: Tensor) -> dict[str, bool]:
    """Launch arguments of the kernels of a round, all of which begin with `follow_previous_kernels`.

    From Hopper on they overlap (programmatic dependent launch), in captured rounds as elsewhere: a kernel may start as
    soon as all blocks of the one in front have, and waits for its end, so that its launch costs no time.
    LAYERSKIP_PDL=0 turns that off.

    Raises:
        ValueError: LAYERSKIP_PDL is neither 0 nor 1.
    """
    return _OVERLAPPING if _can_overlap(tensor.get_device()) and switched_on("LAYERSKIP_PDL") else _ALONE


@functools.cache
def _can_overlap(index: int) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(index) >= (9, 0)


@triton.jit
def follow_previous_kernels(OVERLAP: tl.constexpr):
    """Before a kernel reads or writes anything: lets the next one start, and waits for the end of those in front.

    No block may leave before: the end of one kernel is the end of all before it.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x rounded to the nearest `dtype`, ties to even. Triton's interpreter does not round to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x == x, rounded, bits | 0x400000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def row_offset(row, stride, ALIGNED: tl.constexpr):
    """Elements before row `row`, in 64 bits; ALIGNED tells the compiler that rows start at multiples of WIDE_BYTES.

    It cannot see that for strides it does not specialise on, and would load element by element.
    """
    offset = row.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset
