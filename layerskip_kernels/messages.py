"""How values look in error messages."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """Its repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        return type(value).__name__
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"
