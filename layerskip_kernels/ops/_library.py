"""Registration with torch.library, so that the ops trace under torch.compile and pass torch.library.opcheck.

Eager calls never come through here: dispatching a Python custom op costs several times a direct call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("layerskip_kernels", "DEF")


def register(
    schema: str, kernel: Callable, fake: Callable, *, autograd: tuple[Callable, Callable] | None = None
) -> None:
    """Define `layerskip_kernels::<schema>`, run by `kernel`, traced by `fake` (shapes and dtypes only).

    `autograd`: (setup_context, backward) of an op that can be differentiated.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"layerskip_kernels::{name}", fake, lib=_LIBRARY)
    if autograd:
        setup_context, backward = autograd
        torch.library.register_autograd(
            f"layerskip_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )


def into(out, result):
    """Under torch.compile the traced op is functional: copy its result to `out` (a tensor, or a sequence of them)."""
    if out is None:
        return result
    if isinstance(result, torch.Tensor):
        return out.copy_(result)
    for target, value in zip(out, result):
        target.copy_(value)
    return out
