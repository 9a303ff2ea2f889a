"""Metrics that are known without training, and by how much a metric violates its constraint."""

from __future__ import annotations

from csmae.config import Config
from csmae.model.cost import cost
from csmae.study.options import parse_constraint


def known_metrics(config: Config) -> dict[str, float]:
    """Metrics of a configuration that are known without training: its costs."""
    return {f"cost/{name}": float(value) for name, value in cost(config)._asdict().items()}


def violation(value: float, constraint: str) -> float:
    """By how much a metric violates its constraint, such as ``<= 30e6``; not positive if it satisfies it."""
    sign, limit = parse_constraint(constraint)
    return value - limit if sign == "<=" else limit - value
