"""One decoder for each live transformers model, for as long as the model lives and its weights stay where they are."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch

from layerskip_kernels.decode.decoder import SelfSpeculativeDecoder
from layerskip_kernels.models.loading import check_class

_decoders: weakref.WeakKeyDictionary[Any, dict[str, tuple[tuple, SelfSpeculativeDecoder]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def decoder_for(model: Any, backend: str = "auto") -> SelfSpeculativeDecoder:
    """The decoder of `model` on `backend`; a new one when weights, dtype, device or configuration have changed.

    Weights changed in place are seen anyway, since the decoder shares them. It holds no reference to the model.
    """
    check_class(model)
    state = fingerprint(model)
    with _lock:
        decoders = _decoders.setdefault(model, {})
        made_for, decoder = decoders.get(backend, (None, None))
        if made_for != state:
            decoder = SelfSpeculativeDecoder.from_model(model, backend=backend, max_batch_size=sys.maxsize)
            decoders[backend] = (state, decoder)
    return decoder


def fingerprint(model: torch.nn.Module) -> tuple:
    """Changes when a parameter is replaced, moved, cast or written to, and with the configuration."""
    parameters = tuple(
        (name, values.data_ptr(), p.dtype, p.device, p.shape, 0 if values.is_inference() else values._version)
        for name, p in model.named_parameters(remove_duplicate=False)
        for values in [getattr(p, "qdata", p)]  # torchao's tensors have no address of their own
    )
    return (parameters, model.config.to_json_string(use_diff=False))
