"""Early stopping rules: which trials continue, judged by the scores of all trials at the same epoch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Protocol

from csmae.study.options import Search
from csmae.trials.pareto import as_scores, num_better

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
        grace_epochs: Epoch of the first rung, >= 1. Each rung is rounded to a whole epoch.
        reduction: Ratio of the epochs of consecutive rungs.
    """

    def __init__(self, grace_epochs: float, reduction: int) -> None:
        self._grace_epochs, self._reduction = grace_epochs, reduction
        self._rungs: dict[int, dict[int, tuple[int, Scores]]] = {}

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Record scores. A trial is judged only at its first epoch with scores in a rung; repeating it repeats the decision."""
        rung = self._rung_below(epoch)
        if rung is None:
            return True
        seen = self._rungs.setdefault(rung, {})
        if seen.setdefault(number, (epoch, scores))[0] != epoch:
            return True
        better = num_better([scores for _, scores in seen.values()], list(seen).index(number))
        return better < math.ceil(len(seen) / self._reduction)

    def _rung_below(self, epoch: int) -> int | None:
        rung = self._grace_epochs
        if epoch < round(rung):
            return None
        while round(rung * self._reduction) <= epoch:
            rung *= self._reduction
        return round(rung)


class Hyperband:
    """Brackets of successive halving side by side, from the earliest first rung to none (arXiv 1603.06560, algorithm 1).

    Bracket ``s`` has its rungs at epochs R/ηˢ, R/ηˢ⁻¹, …, R/η, where R is the length of the training and η the reduction; bracket 0
    stops no trial. Each bracket compares only its own trials and gets as large a share of the trials as in the paper.

    Args:
        epochs: R.
        grace_epochs: Minimum epoch of a first rung, >= 1.
        reduction: η.
    """

    def __init__(self, epochs: int, grace_epochs: int, reduction: int) -> None:
        self._weights = bracket_weights(epochs, grace_epochs, reduction)
        self._brackets = [Asha(epochs / reduction**s, reduction) for s in range(len(self._weights))]
        self._assigned: list[int] = []
        """The bracket of each number so far."""
        self._counts = [0] * len(self._weights)

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Record scores in the trial's bracket."""
        return self._brackets[self.bracket(number)].should_continue(number, epoch, scores)

    def bracket(self, number: int) -> int:
        """The bracket of a trial: the one that has the fewest of the earlier numbers in relation to its weight."""
        while len(self._assigned) <= number:
            ratios = [(count + 0.5) / weight for count, weight in zip(self._counts, self._weights, strict=True)]
            bracket = ratios.index(min(ratios))  # Sainte-Laguë's method
            self._assigned.append(bracket)
            self._counts[bracket] += 1
        return self._assigned[number]


def bracket_weights(epochs: int, grace_epochs: int, reduction: int) -> list[int]:
    """How many trials start in each of hyperband's brackets in one round, from bracket 0, which stops no trial, upwards.

    Source: n of algorithm 1 in arXiv 1603.06560, line 3.
    """
    largest = 0
    while grace_epochs * reduction ** (largest + 1) <= epochs:
        largest += 1
    return [-(-(largest + 1) * reduction**s // (s + 1)) for s in range(largest + 1)]


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


def grace_epochs(search: Search) -> int:
    """Epochs that every trial trains before it can be stopped."""
    return 1 if search.grace_epochs is None else search.grace_epochs


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
    rule: StoppingRule = Asha(grace_epochs(search), search.reduction)
    if search.strategy == "hyperband":
        rule = Hyperband(epochs, grace_epochs(search), search.reduction)
    elif search.strategy == "median":
        rule = Median(grace_epochs(search))
    for number, curve in curves:
        for epoch, values in curve.items():
            rule.should_continue(number, epoch, as_scores(values, search.signs))
    return rule
