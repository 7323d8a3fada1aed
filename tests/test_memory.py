"""Tensors in huge pages: asked for where there are any, plain memory in all else."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from layerskip_kernels import memory
from layerskip_kernels.ops.quantized import quantize

LARGE = (5, 1 << 20)  # 10 MiB of bfloat16


def mapping_flags(address: int) -> list[str] | None:
    """VmFlags of the memory mapping that holds an address; None where nothing is mapped."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor_is_like_any_other(dtype):
    tensor = memory.empty(LARGE, dtype)
    assert tensor.shape == LARGE and tensor.dtype == dtype and tensor.is_contiguous() and not tensor.requires_grad
    tensor.fill_(3)
    assert tensor[4, -1] == 3 and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no such advice")
def test_huge_pages_are_asked_for_and_given_back():
    tensor = memory.empty(LARGE, torch.bfloat16)
    address = tensor.data_ptr()
    assert "hg" in mapping_flags(address)
    view = tensor[1:]
    del tensor
    gc.collect()
    assert "hg" in mapping_flags(address)  # a view keeps it
    del view
    gc.collect()
    assert "hg" not in (mapping_flags(address) or [])


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no such advice")
def test_quantized_weights_ask_too():
    weight = quantize(torch.randn(2048, 2048), 8)
    assert "hg" in mapping_flags(weight.values.data_ptr())


def test_small_tensors_are_torchs_own():
    assert memory.empty((3, 7), torch.float32).shape == (3, 7)
    assert memory.empty((), torch.float16).dim() == 0


def test_too_much_memory_is_an_error():
    with pytest.raises((MemoryError, RuntimeError)):
        memory.empty((1 << 50,), torch.float32)
