"""Early stopping rules: which trials continue, judged by the scores of all trials at the same epoch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Protocol

from csmae.study.options import Search
from csmae.trials.pareto import as_scores, num_better

MAX_BRACKETS = 3
"""Maximum number of hyperband's brackets, which differ in their grace period."""

MIN_OTHERS = 3
"""Number of other trials with a score at the same epoch from which the median rule compares, as in Ray's rule."""

Scores = tuple[float, ...]
"""One score per objective, larger is better."""


class StoppingRule(Protocol):
    """Decides whether trials continue. Its only state is the scores of all trials so far."""

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Record a trial's scores after an epoch and return whether the trial continues."""


class Asha:
    """Asynchronous successive halving (arXiv 1810.05934): the best 1/reduction of the trials at each rung continue.

    Trials with several objectives are compared by non-dominated rank (arXiv 2106.12639).

    Args:
        grace_epochs: Epoch of the first rung.
        reduction: Ratio of the epochs of consecutive rungs.
        num_brackets: Trials are assigned to brackets in turn; each further bracket starts one rung later (hyperband).
    """

    def __init__(self, grace_epochs: int, reduction: int, num_brackets: int = 1) -> None:
        self._grace_epochs, self._reduction, self._num_brackets = grace_epochs, reduction, num_brackets
        self._rungs: dict[tuple[int, int], dict[int, tuple[int, Scores]]] = {}

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Record scores. A trial is judged only at its first epoch with scores in a rung; repeating it repeats the decision."""
        bracket = number % self._num_brackets
        rung = self._rung_below(epoch, bracket)
        if rung is None:
            return True
        seen = self._rungs.setdefault((bracket, rung), {})
        if seen.setdefault(number, (epoch, scores))[0] != epoch:
            return True
        better = num_better([scores for _, scores in seen.values()], list(seen).index(number))
        return better < math.ceil(len(seen) / self._reduction)

    def _rung_below(self, epoch: int, bracket: int) -> int | None:
        rung: int = self._grace_epochs * self._reduction**bracket
        if epoch < rung:
            return None
        while rung * self._reduction <= epoch:
            rung *= self._reduction
        return rung


class Median:
    """Stops a trial whose best score is below the median of the other trials' mean scores so far (Vizier, 2017).

    It stops no trial while fewer than ``MIN_OTHERS`` others have a score at the same epoch.

    Args:
        grace_epochs: Epochs before which no trial is stopped.
    """

    def __init__(self, grace_epochs: int) -> None:
        self._grace_epochs = grace_epochs
        self._curves: dict[int, dict[int, float]] = {}
        self._means: dict[int, dict[int, float]] = {}

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Record the score and compare it with the trials that have a score at the same epoch."""
        curve = self._curves.setdefault(number, {})
        curve[epoch] = scores[0]
        means = self._means.setdefault(epoch, {})
        means[number] = statistics.fmean(curve.values())
        others = [mean for other, mean in means.items() if other != number]
        return (
            epoch < self._grace_epochs or len(others) < MIN_OTHERS or max(curve.values()) >= statistics.median(others)
        )


def num_brackets(search: Search, epochs: int) -> int:
    """Number of hyperband's brackets: those whose grace period ends before the training does, and at least one."""
    ends = (search.grace_epochs * search.reduction**bracket for bracket in range(1, MAX_BRACKETS))
    return 1 + len([end for end in ends if end < epochs])


def make_stopping_rule(
    search: Search, curves: Iterable[tuple[int, Mapping[int, Scores]]], epochs: int
) -> StoppingRule | None:
    """Make the stopping rule of a search; None if no trial is stopped early.

    Args:
        search: Names the strategy.
        curves: Number and objectives by epoch of each trial so far; the rule starts with these scores.
        epochs: Epochs of the longest training.
    """
    if search.strategy == "none":
        return None
    brackets = num_brackets(search, epochs) if search.strategy == "hyperband" else 1
    rule: StoppingRule = Asha(search.grace_epochs, search.reduction, brackets)
    if search.strategy == "median":
        rule = Median(search.grace_epochs)
    for number, curve in curves:
        for epoch, values in curve.items():
            rule.should_continue(number, epoch, as_scores(values, search.signs))
    return rule
