"""Metrics that need no training, and by how much a metric breaks its constraint."""

from __future__ import annotations

from csmae.config import Config
from csmae.model.cost import cost
from csmae.study.options import bound


def known_metrics(config: Config) -> dict[str, float]:
    """Metrics of a configuration that need no training."""
    spent = cost(config)
    return {f"cost/{name}": float(value) for name, value in spent._asdict().items()}


def violation(value: float, wanted: str) -> float:
    """By how much a metric breaks its constraint; not positive where it keeps to it."""
    sign, limit = bound(wanted)
    return value - limit if sign == "<=" else limit - value
