"""The settings the paper trained with (its appendix A), by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """One row of the paper's settings."""

    layer_dropout: float  # p_max
    e_scale: float
    curriculum: str
    interval: int | None = None  # R of the rotational curriculum
    learning_rate: float | None = None  # None: not published
    time_schedule: str = "constant"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `LayerSkipArguments`."""
        values = {
            "layer_dropout": self.layer_dropout,
            "layer_dropout_schedule": self.time_schedule,
            "e_scale": self.e_scale,
            "curriculum": self.curriculum,
            "curriculum_interval": self.interval,
            "learning_rate": self.learning_rate,
        }
        return {name: value for name, value in values.items() if value is not None}


RECIPES = {
    "llama2-7b-continual": Recipe(0.1, 0.2, "rotational", 8, 3e-5),
    "llama2-13b-continual": Recipe(0.1, 0.1, "rotational", 39, 2e-5),
    "llama3-8b-continual": Recipe(0.1, 0.1, "rotational", 8),
    "llama3.2-1b-continual": Recipe(0.1, 0.1, "rotational", 8),
    "1.5b-from-scratch": Recipe(0.1, 0.2, "rotational", 23, 8e-4, "exponential"),
    "7b-from-scratch": Recipe(0.2, 0.2, "rotational", 31, 8e-4, "exponential"),
    "code-7b": Recipe(0.1, 1.0, "rotational", 16, 1e-4),
    "topv2-1.5b": Recipe(0.2, 1.0, "gradual", None, 1e-4),
}
