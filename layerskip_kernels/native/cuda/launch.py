"""What every adapter needs: checked addresses, the device guard, the current stream, errors that name the call.

Temporaries come from torch's caching allocator and are used on the stream they were allocated on, which keeps their
memory from being given out before the kernels that read it are done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from layerskip_kernels.native import cuda_library
from layerskip_kernels.native import tensor as native_tensor
from layerskip_kernels.switches import switched_on

DEVICE_TYPE = "cuda"
_NO_GUARD = contextlib.nullcontext()


def address(tensor: Tensor, name: str) -> int:
    """Address of the first element; TypeError or ValueError for what has no plain memory on the device."""
    return native_tensor.address(tensor, name, DEVICE_TYPE)


def optional(tensor: Tensor | None, name: str) -> int:
    return 0 if tensor is None else native_tensor.address(tensor, name, DEVICE_TYPE)


def guard(index: int):
    """Context in which kernels launch on device `index`."""
    return _NO_GUARD if index == torch.cuda.current_device() else torch.cuda.device(index)


def stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


@contextlib.contextmanager
def overlapping():
    """Kernels that this thread launches on the current device start before those in front of them have ended.

    For rounds of decoding: small_linear and exit_head read weights ahead, so none of the ops may have written them just
    before. Without effect before Hopper, without the library, and where LAYERSKIP_PDL is 0.

    Raises:
        ValueError: LAYERSKIP_PDL is neither 0 nor 1.
    """
    asked, (library, _) = switched_on("LAYERSKIP_PDL"), cuda_library()
    if library is None or not asked:
        yield
        return
    before = library.overlap_launches(True)
    try:
        yield
    finally:
        library.overlap_launches(before)


def run(op: str, kernel: Callable, tensors: tuple[Tensor | None, ...], *arguments) -> None:
    """`kernel(*arguments, stream)` on the device of the first of `tensors` and its current stream.

    Raises RuntimeError with the op, the shapes of `tensors` and the device when the launch fails.
    """
    index = tensors[0].get_device()
    with guard(index):
        error = kernel(*arguments, stream(index))
    if error is not None:
        shapes = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors if t is not None)
        raise RuntimeError(f"{op} on {tensors[0].device} with tensors {shapes}: {error}")
