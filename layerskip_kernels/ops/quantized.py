from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from layerskip_kernels import memory, registry
from layerskip_kernels.ops import _check

BLOCK = 64  # columns that share an activation scale; a weight's group is a multiple of it
LANES = 16  # of a vector: see `stored`


class QuantizedWeight(NamedTuple):
    """A linear's weight [N, C] in 8 or 4 bits: ``w[n, c] = scale[n, c // group] · q[n, c] (+ offset[n, c // group])``.

    `small_linear`, `exit_head` and `decoder_stack` take it in place of a weight tensor. They round the activations, per
    row and block of 64 columns, to 16-bit integers with a power of two as scale, 2^(⌊log2 max|x|⌋ - 14): bfloat16
    values down to 1/128 of the block's largest stay as they are. Products of one lane (see `stored`), at most 64, are
    summed exactly, lanes and units in a fixed order in float32. A block whose largest is below 2^-100 counts as zero; a
    row with NaN or infinity in it becomes NaN.
    """

    values: torch.Tensor  # int8 [N, C], or uint8 [N, C / 2] with two of q + 8 in a byte, in the order of `stored`
    scale: torch.Tensor  # bfloat16, or float32, [N, ceil(C / group)]
    group: int  # columns that share a scale: a multiple of 64; the last group may be short
    offset: torch.Tensor | None = None  # float32, shape of scale: of formats with a zero point

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] * 8 // self.bits

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.scale, self.offset) if t is not None)


def quantize(
    weight: torch.Tensor,
    bits: int,
    group: int = BLOCK,
    *,
    error: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Symmetric rounding to nearest, the scale, in bfloat16, from each group's largest magnitude.

    8 bits: ``scale = max|w| / 127``. 4 bits: the value of largest magnitude becomes -8 (so a scale may be negative) and
    what would be 8 becomes 7, as in llama.cpp's Q4_0. On the CPU the bits are the same on every backend.

    Args:
        weight: [N, C] float32, float16 or bfloat16, finite; C even for 4 bits.
        bits: 8 or 4.
        group: columns that share a scale, a multiple of 64.
        error: [N] float32, gets the Euclidean norm of each row of ``weight - dequantize(result)``.
        norm: [N] float32, gets the Euclidean norm of each row of `weight`.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape or range, or a weight that is not finite.
    """
    _check.tensor("weight", weight, (None, None), dtype=_check.FLOATS)
    if bits not in (8, 4):
        raise ValueError(f"bits={bits}: choose 8 or 4")
    _check_group("group", group)
    rows, width = weight.shape
    if bits == 4 and width % 2:
        raise ValueError(f"weight: {width} columns, 4 bits need an even number")
    _check.optional("error", error, (rows,), dtype=torch.float32, like=weight)
    _check.optional("norm", norm, (rows,), dtype=torch.float32, like=weight)
    given = (error, norm)
    measured = [None if t is None else torch.empty_like(t) for t in given]  # a rejected call changes no argument
    quantized = _implementation(weight)(weight.detach(), bits, group, error=measured[0], norm=measured[1])
    for out, result in zip(given, measured):
        if out is not None:
            out.copy_(result)
    return quantized


def _implementation(weight: torch.Tensor) -> Callable:
    """The native kernel where it can, whatever the other ops shall run on, unless that is the reference."""
    native = registry.choice() != "reference" and not registry.why_not("cpu", "quantize", weight.device, weight.dtype)
    return registry.resolve("quantize", weight.device, weight.dtype, "cpu" if native else "reference")


def unset(weight: torch.Tensor, bits: int, group: int) -> QuantizedWeight:
    """Memory for `weight` in `bits`, contents undefined."""
    rows, width = weight.shape
    values = _empty(rows, width, bits, weight.device)
    return QuantizedWeight(values, weight.new_empty(rows, -(-width // group), dtype=torch.bfloat16), group)


def not_finite(row: int) -> ValueError:
    return ValueError(f"weight: NaN or infinity in row {row}, expected finite values")


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, C] as numbers of `dtype`."""
    check_weight("weight", weight)
    values, scale, group, offset = weight
    q = numbers(values)
    width = q.shape[1]
    w = q.to(dtype) * spread(scale, group, width, dtype)
    return w if offset is None else w + spread(offset, group, width, dtype)


def stored(q: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [N, C] -> `QuantizedWeight.values`: columns in the order in which the kernels' vectors take them.

    A lane of a vector sums columns of one group alone, and many of them before their scale is due. So blocks of 64
    columns come in units: of 16 blocks as long as there are so many, then of 8, 4, 2 and 1. A unit of b blocks is 16
    lanes times 4 b consecutive columns, stored with lanes and columns exchanged, four columns at a time: [b steps, 16
    lanes, 4 columns]. What is left, less than a block, is in order. With 4 bits a byte holds an even step in its low
    nibble and the next step in the high one; in a unit of one block and in what is left, columns 2i and 2i + 1.
    """
    rows, width = q.shape
    values = _empty(rows, width, bits, q.device)
    for first, last, steps in _units(width):
        part = q[:, first:last]
        if steps > 1:
            part = part.reshape(rows, LANES, steps, 4).transpose(1, 2)
        if bits == 4:
            low, high = (part + 8).to(torch.uint8).reshape(rows, -1, 2, _apart(steps)).unbind(2)
            part = low | high << 4
        values[:, first * bits // 8 : last * bits // 8] = part.reshape(rows, -1)
    return values


def numbers(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `stored`: int8 [N, C]."""
    rows, bits = len(values), 8 if values.dtype == torch.int8 else 4
    width = values.shape[1] * 8 // bits
    q = values.new_empty(rows, width, dtype=torch.int8)
    for first, last, steps in _units(width):
        part = values[:, first * bits // 8 : last * bits // 8]
        if bits == 4:
            part = part.reshape(rows, -1, _apart(steps))
            part = torch.stack((part & 15, part >> 4), 2).to(torch.int8) - 8
        if steps > 1:
            part = part.reshape(rows, steps, LANES, 4).transpose(1, 2)
        q[:, first:last] = part.reshape(rows, -1)
    return q


def _units(width: int) -> Iterator[tuple[int, int, int]]:
    """(first column, one behind the last, steps) of each unit of a row, and of what is left after them."""
    first = 0
    while first < width:
        steps = min(LANES, 1 << max((width - first) // BLOCK, 1).bit_length() - 1)
        last = min(first + steps * BLOCK, width)
        yield first, last, steps
        first = last


def _apart(steps: int) -> int:
    """How far apart the two numbers of a byte are in a unit."""
    return LANES * 4 if steps > 1 else 1


def _empty(rows: int, width: int, bits: int, device: torch.device) -> torch.Tensor:
    return memory.empty((rows, width * bits // 8), torch.int8 if bits == 8 else torch.uint8, device)


def spread(per_group: torch.Tensor, group: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, groups] -> [N, width]: each group's number in every column of the group."""
    return per_group.to(dtype).repeat_interleave(group, 1)[:, :width]


def refuse_tracing(name: str) -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{name}: quantized weights do not trace under torch.compile, call the op outside it")


def check_weight(
    name: str,
    weight: object,
    shape: tuple[int | None, int | None] = (None, None),
    *,
    dtype: torch.dtype | None = None,
    like: torch.Tensor | None = None,
) -> None:
    """A linear's weight, of `shape`: a tensor of `dtype`, or a `QuantizedWeight`; on the device of `like`."""
    if not isinstance(weight, QuantizedWeight):
        _check.tensor(name, weight, shape, dtype=dtype, like=like)
        return
    _check.tensor(f"{name}.values", weight.values, (None, None), dtype=(torch.int8, torch.uint8), like=like)
    _check_group(f"{name}.group", weight.group)
    rows, width = weight.shape
    if any(wanted is not None and wanted != n for wanted, n in zip(shape, (rows, width))):
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}.values: {weight.bits} bits, a weight of shape [{rows}, {width}], expected [{wanted}]")
    groups = (rows, -(-width // weight.group))
    _check.tensor(f"{name}.scale", weight.scale, groups, dtype=(torch.bfloat16, torch.float32), like=weight.values)
    _check.optional(f"{name}.offset", weight.offset, groups, dtype=torch.float32, like=weight.values)


def check_one_kind(name: str, weights: Sequence[object], labels: Sequence[str] | None = None) -> None:
    """Weights of one pass over x: all tensors, or all quantized to as many bits."""
    kinds = [w.bits if isinstance(w, QuantizedWeight) else None for w in weights]
    if kinds.count(kinds[0]) < len(kinds):
        labels = labels or [f"[{i}]" for i in range(len(kinds))]
        listed = ", ".join(f"{label} {f'in {bits} bits' if bits else 'a tensor'}" for label, bits in zip(labels, kinds))
        raise TypeError(f"{name}: {listed}, expected all of one kind")


def _check_group(name: str, group: object) -> None:
    if not isinstance(group, int) or group < BLOCK or group % BLOCK:
        raise ValueError(f"{name}={group}: choose a multiple of {BLOCK}")
