"""Which backend serves an op, and why the others don't.

A backend is a package with three names:

    why_unavailable() -> str | None                            None when it runs on this machine
    OPS: dict[str, Callable]                                   op name -> implementation
    why_unsupported(op, *, device, dtype) -> str | None        None when it takes this call
    QUANTIZED_OPS: Container[str]                              those that take a `QuantizedWeight`; may be missing

Implementations have the signature of `layerskip_kernels.ops.<op>` and validate nothing: the public op does, once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace

import torch

from layerskip_kernels.messages import shown

log = logging.getLogger("layerskip_kernels")

DECODE_OPS = (  # what a decoder binds
    "rms_norm",
    "small_linear",
    "swiglu",
    "rope_append",
    "verify_attention",
    "exit_head",
    "verify_tokens",
    "verify_rejection",
    "kv_rollback",
    "decoder_stack",
)
_WITH_WEIGHTS = ("small_linear", "exit_head", "decoder_stack")
OP_NAMES = (*DECODE_OPS, "early_exit_cross_entropy")  # `quantize` prepares weights: every backend does without
_MODULES = {
    "cuda": "layerskip_kernels.native.cuda",
    "triton": "layerskip_kernels.triton",
    "cpu": "layerskip_kernels.native.cpu",
    "reference": "layerskip_kernels.reference",
}
_AUTO = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # device type -> backends `auto` tries, best first
_chosen: ContextVar[str | None] = ContextVar("layerskip_backend", default=None)


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run this op here; the message says why."""


@functools.cache
def _backend(name: str) -> ModuleType | str:
    """The backend's package, or the reason it is not part of this installation."""
    try:
        module = import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name == _MODULES[name]:
            return "not part of this version yet"
        return f"the package {error.name} is not installed"
    except ImportError as error:  # a package that is too old, or broken: the others serve
        return f"it can't be imported: {error}"
    # A leftover folder without code imports too, as a namespace package.
    return module if hasattr(module, "OPS") else "not part of this version yet"


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype, *, quantized: bool = False) -> str | None:
    """Why `backend` can't run `op` on tensors of this device and dtype; None when it can.

    `quantized`: with a `QuantizedWeight`; ops without weights ignore it.
    """
    module = _backend(backend)
    if isinstance(module, str):
        return module
    if reason := module.why_unavailable():
        return reason
    if op not in module.OPS:
        return f"it has no {op}"
    if quantized and op in _WITH_WEIGHTS and op not in getattr(module, "QUANTIZED_OPS", ()):
        return "it takes no quantized weights"
    return module.why_unsupported(op, device=device, dtype=dtype)


def check_backend_name(name: str, source: str = "backend") -> str:
    if not isinstance(name, str) or (name not in _MODULES and name != "auto"):
        raise ValueError(f"{source}={shown(name)}: choose auto, {', '.join(_MODULES)}")
    return name


def choice(backend: str | None = None) -> str:
    """The backend asked for: the argument, else `use_backend`, else LAYERSKIP_BACKEND, else "auto"."""
    if asked := backend or _chosen.get():
        return check_backend_name(asked)
    return check_backend_name(os.environ.get("LAYERSKIP_BACKEND") or "auto", "LAYERSKIP_BACKEND")


def select(
    op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None, *, quantized: bool = False
) -> str:
    """Name of the backend that serves `op`.

    Raises BackendUnavailable when an explicitly chosen backend can't; `auto` falls back to `reference` with a warning.
    """
    asked = choice(backend)
    if asked != "auto":
        if reason := why_not(asked, op, device, dtype, quantized=quantized):
            raise BackendUnavailable(f"backend {asked!r} can't run {op} ({dtype} on {device.type}): {reason}")
        return asked
    reasons = []
    for name in _AUTO.get(device.type, ()):
        reason = why_not(name, op, device, dtype, quantized=quantized)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    _warn_reference(op, "; ".join(reasons) or f"no backend for device type {device.type!r}")
    return "reference"


@functools.cache
def _warn_reference(op: str, reasons: str) -> None:
    log.warning("%s runs on the slow reference backend (%s)", op, reasons)


def resolve(
    op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None, *, quantized: bool = False
) -> Callable:
    """The implementation that serves `op`. See `select`."""
    return _backend(select(op, device, dtype, backend, quantized=quantized)).OPS[op]


def bind(
    device: torch.device, dtype: torch.dtype, backend: str | None = None, *, quantized: bool = False
) -> SimpleNamespace:
    """Decoding's ops resolved once, as attributes, for the life of a decoder; `.backends` says which backend each got.

    `decoder_stack` is the backend's own when all ops come from one backend that has it, else the composition of the
    bound ops. `quantized`: for weights some of which are a `QuantizedWeight`.
    """
    from layerskip_kernels.reference.decoder_stack import compose

    ops = SimpleNamespace(backends={})
    for op in DECODE_OPS:
        if op != "decoder_stack":
            name = ops.backends[op] = select(op, device, dtype, backend, quantized=quantized)
            setattr(ops, op, _backend(name).OPS[op])
    names = set(ops.backends.values())
    fused = names.pop() if len(names) == 1 else None
    if fused and why_not(fused, "decoder_stack", device, dtype, quantized=quantized) is None:
        ops.decoder_stack, ops.backends["decoder_stack"] = _backend(fused).OPS["decoder_stack"], fused
    else:
        ops.decoder_stack, ops.backends["decoder_stack"] = functools.partial(compose, ops), "composed"
    return ops


@contextmanager
def use_backend(name: str):
    """Within the block, every op and every decoder made runs on backend `name`, or raises BackendUnavailable."""
    token = _chosen.set(check_backend_name(name))
    try:
        yield
    finally:
        _chosen.reset(token)


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backends()`."""

    name: str
    available: bool
    reason: str | None  # why it does not work here
    ops: tuple[str, ...]  # what it implements

    def __str__(self) -> str:
        return f"{self.name:10s} " + (", ".join(self.ops) if self.available else f"not here: {self.reason}")


class BackendReport(tuple):
    """Tuple of BackendStatus that prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def backends() -> BackendReport:
    """What each backend can do on this machine, and why it can't."""
    rows = []
    for name in _MODULES:
        module = _backend(name)
        reason = module if isinstance(module, str) else module.why_unavailable()
        ops = () if isinstance(module, str) else tuple(op for op in OP_NAMES if op in module.OPS)
        if reason is None and not ops:
            reason = "it has no kernels yet"
        rows.append(BackendStatus(name, reason is None, reason, ops))
    return BackendReport(rows)
