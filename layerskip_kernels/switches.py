"""Environment variables that turn something off, to find out whether it is to blame, or what it brings."""

from __future__ import annotations

import os


def switched_on(variable: str) -> bool:
    """False where the variable is 0; ValueError for what is neither 0 nor 1."""
    value = os.environ.get(variable) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{variable}={value}: choose 0 or 1")
    return value == "1"
