"""Numbers, durations and settings as users read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_settings(values: Mapping[str, Any]) -> str:
    """Format a point of the space as one line."""
    return " ".join(
        f"{name}={format_number(value) if isinstance(value, float) else value}" for name, value in values.items()
    )


def format_number(value: float | None) -> str:
    """Format a number with four significant digits; None is empty."""
    return "" if value is None else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Format a duration such as ``45 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
