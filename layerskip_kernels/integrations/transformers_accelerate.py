"""`lk.accelerate(model)`: code written for `model.generate` runs on our decoder as it is."""

from __future__ import annotations

import inspect
import logging
import types
import weakref
from typing import Any

import torch

from layerskip_kernels.decode import arguments
from layerskip_kernels.integrations.decoders import decoder_for, fingerprint
from layerskip_kernels.integrations.transformers_generate import generate
from layerskip_kernels.integrations.transformers_inputs import Unsupported

log = logging.getLogger("layerskip_kernels")

_MAX_SPECULATIONS = 63
# what a copy that lost its last layers may say otherwise
_OF_DEPTH = {"num_hidden_layers", "layer_types", "no_rope_layers", "max_window_layers", "layerskip", "_name_or_path"}
_exits: weakref.WeakKeyDictionary[Any, tuple[tuple, tuple, int | None]] = weakref.WeakKeyDictionary()
_warned: set[str] = set()


class Accelerated:
    """What `accelerate` did to a model. `undo()`, or the end of a `with` block, takes it back."""

    def __init__(self, model: Any, method: types.MethodType):
        self.model, self._method, self._before = model, method, vars(model).get("generate")
        model.generate = method

    def undo(self) -> None:
        """`model.generate` is again what it was; does nothing the second time, or when someone else replaced it."""
        if vars(self.model).get("generate") is not self._method:
            return
        del self.model.generate
        if self._before is not None:
            self.model.generate = self._before

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def accelerate(
    model: Any, *, exit_layer: int | None = None, num_speculations: int | None = None, backend: str = "auto"
) -> Accelerated:
    """From now on `model.generate(...)` is `lk.generate(model, ...)`.

    `generate(assistant_early_exit=E)` leaves at layer E, and so does `generate(assistant_model=copy)` where the copy is
    the model without the layers from E on, as LayerSkip model cards make it; `num_assistant_tokens` is then K. What
    `lk.generate` refuses, and any other assistant, goes to transformers' own `generate`, with a warning the first time.

    Args:
        model: as in `lk.generate`. It receives an attribute `generate`; weights and configurations stay as they are.
        exit_layer, num_speculations, backend: for calls that say nothing else; as in `lk.generate`.

    Returns:
        `Accelerated`, a handle with `undo()` that is a context manager, too.

    Raises:
        ValueError, TypeError: a model that is not supported, or arguments out of range.
    """
    model = getattr(model, "_orig_mod", model)
    config = decoder_for(model, backend).config
    arguments.exit_layer(exit_layer, config, None)
    arguments.speculations(num_speculations, 0)
    settings = dict(exit_layer=exit_layer, num_speculations=num_speculations, backend=backend)

    def accelerated(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _generate(self, settings, args, kwargs)

    accelerated.__name__ = "generate"  # so that a pickled model finds its class's own
    # a bound method, because a deep copy of the model then gets one bound to the copy
    return Accelerated(model, types.MethodType(accelerated, model))


def _generate(model: Any, settings: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    bound = inspect.signature(type(model).generate).bind(model, *args, **kwargs).arguments
    call = {**bound.pop("kwargs", {}), **bound}
    del call["self"]
    if call.get("custom_generate") is not None:
        return type(model).generate(model, **call)
    try:
        return generate(model, **_ours(model, settings, dict(call)))
    except Unsupported as reason:
        if str(reason) not in _warned:
            log.warning("%s: transformers' own generate runs instead", reason)
            _warned.add(str(reason))
        own = {name: value for name, value in call.items() if name not in inspect.signature(generate).parameters}
        standard = inspect.signature(type(model).generate).parameters
        own.update({name: call[name] for name in (*standard, "input_ids", "tokenizer") if name in call})
        return type(model).generate(model, **own)


def _ours(model: Any, settings: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """The call with the assistant's part in it said as exit layer and speculations."""
    assistant = call.pop("assistant_model", None)
    said = [call, vars(call.get("generation_config") or object), vars(model.generation_config)]
    if assistant is not None:
        said.append(vars(assistant.generation_config))
        exit_layer = exit_of_copy(model, assistant)
        if exit_layer is None:
            raise Unsupported("assistant_model: not a copy of the model without its last layers")
    else:
        exit_layer = _first(said, "assistant_early_exit")
    if exit_layer is not None:
        tokens = _first(said, "num_assistant_tokens")
        settings = {**settings, "exit_layer": exit_layer}
        if tokens is not None:
            settings["num_speculations"] = min(int(tokens), _MAX_SPECULATIONS)
    return {**settings, **call}


def _first(places: list[Any], name: str) -> Any:
    return next((place[name] for place in places if place.get(name) is not None), None)


def exit_of_copy(model: Any, assistant: Any) -> int | None:
    """How many layers `assistant` has, if it is `model` with its last layers left out; None if it is not."""
    states = fingerprint(model), fingerprint(assistant)
    known = _exits.get(assistant)
    if known is None or known[:2] != states:
        _exits[assistant] = known = (*states, _compare(model, assistant))
    return known[2]


def _compare(model: Any, assistant: Any) -> int | None:
    if type(assistant) is not type(model):
        return None
    ours, theirs = model.config.to_dict(), assistant.config.to_dict()
    if any(ours.get(name) != theirs.get(name) for name in {*ours, *theirs} - _OF_DEPTH):
        return None
    layers = len(assistant.model.layers)
    own = dict(model.named_parameters(remove_duplicate=False))
    copied = dict(assistant.named_parameters(remove_duplicate=False))
    wanted = {name for name in own if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers}
    if not 1 <= layers < len(model.model.layers) or copied.keys() != wanted:
        return None
    return layers if all(_same(own[name], copied[name]) for name in wanted) else None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
