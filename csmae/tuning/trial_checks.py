"""Checks of what trials report: constraints, missing metrics, and searches that cannot succeed."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping

import optuna

from csmae.study.metrics import COSTS, TERMS, is_always_reported
from csmae.study.options import Search, violation

NUM_FIRST = 3
"""Trials, in the order in which they start, that must fail for the same reason before the search is aborted."""


def record_constraints(
    trial: optuna.Trial, metrics: Mapping[str, float], constraints: Mapping[str, str], cut_short: bool = False
) -> None:
    """Record by how much a trial's last metrics violate each constraint, see ``measured_violations``."""
    for name, over in measured_violations(metrics, constraints, cut_short).items():
        trial.set_constraint(name, over)


def measured_violations(
    metrics: Mapping[str, float], constraints: Mapping[str, str], cut_short: bool = False
) -> dict[str, float]:
    """By how much a trial's last metrics violate each constraint.

    A constraint on a loss term that the configuration does not compute is kept. If the trial was cut short, a constraint whose
    metric is unknown is violated.
    """
    found = {}
    for name, bound in constraints.items():
        if name in metrics:
            value = metrics[name]
            found[name] = violation(value, bound) if math.isfinite(value) else math.inf
        elif name in TERMS and metrics:
            found[name] = 0.0
        elif cut_short and name not in COSTS:  # costs were checked before the training
            found[name] = math.inf
    return found


def missing_result(metrics: Mapping[str, float], search: Search) -> str | None:
    """Why a complete training has no result, from the metrics of its last epoch; None if it has one."""
    for name in (*search.objectives, *search.constraints):
        if name not in metrics and is_always_reported(name, scored=True):
            return f"{name} was not reported"
        if not math.isfinite(metrics.get(name, 0.0)):
            return f"{name} was {metrics[name]} at the end"
    return None


def unreported_metric(reported: Container[str], search: Search, scored: bool) -> str | None:
    """Find an objective or a constraint whose metric was due in an epoch, with or without scores, and was never reported."""
    names = (name for name in (*search.objectives, *search.constraints) if is_always_reported(name, scored))
    return next((name for name in names if name not in reported), None)


class FirstTrialsCheck:
    """Finds out whether the first trials of a study all fail for the same reason.

    Args:
        enabled: False in a study that already has a trained trial.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._failures: dict[int, str | None] = {}
        """For each of the first trials, by number, why it failed; None while it runs."""

    def start(self, number: int) -> None:
        """Note that a trial starts."""
        if len(self._failures) < NUM_FIRST:
            self._failures.setdefault(number, None)

    def end(self, number: int, failure: str | None) -> str | None:
        """Note why a trial failed, or that it did not, which disables the check.

        Returns:
            The common reason, once all of the first trials have failed for it. Reasons may differ in numbers.
        """
        self._enabled = self._enabled and failure is not None
        if number in self._failures:
            self._failures[number] = failure
        reasons = [reason for reason in self._failures.values() if reason is not None]
        alike = len(reasons) == NUM_FIRST and len({re.sub(r"\d+", "", reason) for reason in reasons}) == 1
        return reasons[-1] if self._enabled and alike else None
