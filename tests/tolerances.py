"""How far a kernel may be from the reference: one table per dtype, with the few ops that need their own row.

Both round at the same points, so what is left is the order of float32 sums, which may flip one rounding.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    atol: float
    rtol: float


BY_DTYPE = {
    torch.float32: Tolerance(2e-5, 2e-5),
    torch.float16: Tolerance(1e-3, 2.0**-9),
    torch.bfloat16: Tolerance(8e-3, 2.0**-6),
}

# A rounding flipped in one layer passes through every later one.
BY_OP = {
    "decoder_stack": {
        torch.float32: Tolerance(2e-4, 2e-4),
        torch.float16: Tolerance(1e-2, 1e-2),
        torch.bfloat16: Tolerance(8e-2, 5e-2),
    },
    # Logits, log-probabilities and probabilities stay float32, but the normed hidden state is rounded.
    "exit_head": {
        torch.float32: Tolerance(5e-5, 2e-5),
        torch.float16: Tolerance(4e-3, 1e-3),
        torch.bfloat16: Tolerance(3e-2, 8e-3),
    },
}


def tolerance(dtype: torch.dtype, op: str | None = None) -> Tolerance:
    return BY_OP.get(op, BY_DTYPE)[dtype]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, op: str | None = None, dtype: torch.dtype | None = None):
    """`actual`, from any device, against `expected`; integers exactly. `dtype`: the model's, if not the result's."""
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual.cpu(), expected.cpu())
        return
    atol, rtol = tolerance(dtype or expected.dtype, op)
    torch.testing.assert_close(actual.cpu(), expected.cpu(), atol=atol, rtol=rtol, equal_nan=True)
