"""Shared by the op tests: seeded inputs in awkward layouts, guarded outputs, the reference's answer, bad arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import layerskip_kernels as lk

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MARGIN = 5  # elements beside a view: a multiple of no vector width


def dtype_name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


class Inputs:
    """Random tensors of one device and dtype; the same numbers on every device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, seed: int = 0):
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return self.place(torch.randn(shape, generator=self.generator) * scale + shift)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers in the dtype: sums of their products are exact, so ties are real."""
        return self.place(torch.randint(low, high, shape, generator=self.generator))

    def weight(self, rows: int, columns: int) -> torch.Tensor:
        return self.randn(rows, columns, scale=columns**-0.5)

    def norm(self, columns: int) -> torch.Tensor:
        return self.randn(columns, scale=0.2, shift=1.0)

    def ids(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def place(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype).to(self.device)

    def int32(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a view into a larger NaN-filled tensor: rows apart, unaligned, last dimension contiguous."""
    view = Guarded(tensor.shape, tensor.dtype, tensor.device).view
    return view.copy_(tensor)


class Guarded:
    """An output to write to: `view`, poisoned, inside a larger buffer whose other elements must not change."""

    def __init__(self, shape, dtype: torch.dtype, device):
        shape = tuple(shape)
        outer = (*(n + 2 for n in shape[:-1]), shape[-1] + 2 * MARGIN)
        inner = (*(slice(1, n + 1) for n in shape[:-1]), slice(MARGIN, MARGIN + shape[-1]))
        canary = float("nan") if dtype.is_floating_point else 77 if dtype != torch.bool else True
        self.buffer = torch.full(outer, canary, dtype=dtype, device=device)
        self.outside = torch.ones(outer, dtype=torch.bool, device=device)
        self.outside[inner] = False
        if dtype.is_floating_point:
            self.buffer[self.outside] = 7.25
        self.view = self.buffer[inner]
        self.before = self.buffer[self.outside].clone()

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Guarded:
        """Guards a copy of `tensor`, for arguments that an op updates in place."""
        guarded = cls(tensor.shape, tensor.dtype, tensor.device)
        guarded.view.copy_(tensor)
        return guarded

    def assert_surroundings_unchanged(self) -> None:
        assert torch.equal(self.buffer[self.outside], self.before), "wrote outside the output"


def clone(tree):
    """A deep copy of arguments: every tensor cloned."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def reference(op: Callable, *args, **kwargs):
    """The reference's result on copies of the arguments on the CPU; returns (result, args, kwargs) after the call."""
    args, kwargs = tree_map(lambda leaf: leaf.cpu().clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    with lk.use_backend("reference"):
        return op(*args, **kwargs), args, kwargs


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality, NaN payloads aside."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


class num_threads:
    """Within the block torch, and with it the native kernels, use `count` threads."""

    def __init__(self, count: int):
        self.count = count

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *exception):
        torch.set_num_threads(self.before)


# Bad arguments. A path names a nested argument the way error messages do: "x", "weights[1]", "sampling.seed".


def get(arguments: Mapping, path: str):
    root, *rest = re.findall(r"[A-Za-z_]\w*|\d+", path)
    value = arguments[root]
    for step in rest:
        value = value[int(step)] if step.isdigit() else getattr(value, step)
    return value


def replaced(arguments: Mapping, path: str, value) -> dict:
    """A copy of `arguments` with the one at `path` replaced."""
    root, *rest = re.findall(r"[A-Za-z_]\w*|\d+", path)
    if not rest:
        return {**arguments, root: value}
    (step,) = rest
    outer = arguments[root]
    if step.isdigit():
        value = type(outer)(value if i == int(step) else old for i, old in enumerate(outer))
    else:
        value = outer._replace(**{step: value})
    return {**arguments, root: value}


_WRONG_DTYPE = {torch.int32: torch.int64, torch.int64: torch.int32, torch.bool: torch.uint8}
DEFECTS = ("type", "dtype", "device", "rank", "size", "stride")


def defective(tensor: torch.Tensor, defect: str):
    """`tensor` with one thing wrong, and the exception that it deserves."""
    if defect == "type":
        return tensor.tolist(), TypeError
    if defect == "dtype":
        return tensor.to(_WRONG_DTYPE.get(tensor.dtype, torch.float64)), TypeError
    if defect == "device":
        return tensor.to("meta"), ValueError
    if defect == "rank":
        return tensor[None], ValueError
    if defect == "size":
        return torch.cat((tensor, tensor[..., :1]), dim=-1), ValueError
    assert defect == "stride"
    return tensor[..., None].expand(*tensor.shape, 2).contiguous()[..., 0], ValueError


def bad_tensors(*paths: str, free_size: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parametrize (path, defect) over the tensor arguments; those in `free_size` may have any last dimension."""
    cases = [(p, d) for p in paths for d in DEFECTS if not (d == "size" and p in free_size)]
    return pytest.mark.parametrize(("path", "defect"), cases, ids=[f"{p}-{d}" for p, d in cases])


def assert_rejects_tensor(op: Callable, arguments: Mapping, path: str, defect: str) -> None:
    bad, error = defective(get(arguments, path), defect)
    # A first argument on another device, or a size that two arguments disagree about, may be reported at the other one.
    first = path == next(iter(arguments))
    elsewhere = defect == "size" or (first and defect == "device")
    start = r"[a-z_]\w*(\[\d+\])?(\.\w+)?: " if elsewhere else re.escape(path) + ": "
    assert_rejects(op, replaced(arguments, path, bad), error, start)


def assert_rejects(op: Callable, arguments: Mapping, error: type[Exception], start: str) -> None:
    """`op(**arguments)` raises `error` with one sentence beginning with the pattern `start`, and writes to nothing."""
    before = [t.clone() for t in tensors(arguments)]
    with pytest.raises(error, match="^" + start) as caught:
        op(**arguments)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    for tensor, copy in zip(tensors(arguments), before, strict=True):
        assert tensor.is_meta or same_bits(tensor, copy), "a rejected call changed an argument"
