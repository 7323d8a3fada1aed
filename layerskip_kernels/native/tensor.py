"""torch tensor -> address, for tensors whose elements lie in plain memory of the right device.

Every kernel call passes through here several times, so the checks take the cheapest attribute that answers each
question; which one failed is worked out afterwards.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

FLOAT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of csrc/common/dtypes.h

_grad_enabled = torch.is_grad_enabled


def address(tensor: Tensor, name: str, device_type: str) -> int:
    """Address of the first element of `tensor`, whose last dimension is contiguous.

    Raises TypeError or ValueError for what has no plain memory on `device_type`, or carries a gradient.
    """
    if (
        (type(tensor) is Tensor or type(tensor) is Parameter)
        and (tensor.is_cpu if device_type == "cpu" else tensor.is_cuda)
        and not (tensor.requires_grad and _grad_enabled())
        and (tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] == 1)
    ):
        pointer = tensor.data_ptr()
        if pointer % tensor.element_size() == 0 and (pointer or not tensor.numel()):
            return pointer
    _refuse(tensor, name, device_type)


def dtype_code(tensor: Tensor, name: str) -> int:
    """The library's number for a float dtype."""
    code = FLOAT_DTYPES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"{name}: dtype {tensor.dtype}, choose float32, float16 or bfloat16")
    return code


def _refuse(tensor: Tensor, name: str, device_type: str) -> NoReturn:
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        raise TypeError(f"{name}: a {type(tensor).__name__} has no plain memory, expected a torch.Tensor")
    if tensor.device.type != device_type:
        raise ValueError(f"{name}: on {tensor.device}, this backend takes {device_type} tensors")
    if tensor.requires_grad and _grad_enabled():
        raise ValueError(f"{name}: requires_grad, and kernels have no backward: use torch.no_grad() or detach it")
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name}: last dimension has stride {tensor.stride(-1)}, it must be contiguous")
    size = tensor.element_size()
    raise ValueError(f"{name}: its memory at {tensor.data_ptr():#x} is not at a multiple of {size} bytes")
