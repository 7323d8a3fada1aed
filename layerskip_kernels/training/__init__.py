"""The LayerSkip recipe (arXiv 2404.16710): trains a transformers model whose early layers can draft for the others.

`LayerSkipTrainer` is the recipe as a `transformers.Trainer`; its parts stand alone: `LayerDropout`, `early_exit_loss`,
the schedules in `layer_dropout`, the curricula in `curriculum`, the published settings in `recipes`.

Layers are numbered 0..L-1 as in the paper. Leaving after layer l is decoding's `exit_layer` l + 1.
"""

from importlib import import_module

from layerskip_kernels.training.early_exit_loss import EarlyExitOutput, early_exit_loss, exit_weights
from layerskip_kernels.training.layer_dropout import LayerDropout
from layerskip_kernels.training.recipes import RECIPES, Recipe

_LAZY = ("LayerSkipArguments", "LayerSkipTrainer")  # their base classes take transformers seconds to import
__all__ = [
    "RECIPES",
    "EarlyExitOutput",
    "LayerDropout",
    "LayerSkipArguments",
    "LayerSkipTrainer",
    "Recipe",
    "early_exit_loss",
    "exit_weights",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(f"{__name__}.trainer"), name)
    return value
