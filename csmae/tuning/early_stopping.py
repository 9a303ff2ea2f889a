"""Early stopping rules: which trials continue, from the scores of all trials at the same epoch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from csmae.study.options import Search
from csmae.trials.pareto import num_better

MAX_BRACKETS = 3
"""Grace periods that hyperband tries side by side, at most."""


MIN_OTHERS = 3
"""Other trials that must have come as far before median compares with them, as in Ray's rule."""


Scores = tuple[float, ...]


class StoppingRule(Protocol):
    """Decides on trials from their scores, larger being better. Its state is the scores it was told."""

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Note a trial's scores after an epoch, one for each objective, and say whether the trial goes on."""


class Asha:
    """Asynchronous successive halving (arXiv 1810.05934): at each rung, the best 1/reduction of those seen go on.

    Several objectives compare by non-dominated rank (arXiv 2106.12639).

    Args:
        grace_epochs: The first rung.
        reduction: Factor from a rung to the next.
        num_brackets: Trials take turns; each further bracket starts one rung later (hyperband).
    """

    def __init__(self, grace_epochs: int, reduction: int, num_brackets: int = 1) -> None:
        self._grace_epochs, self._reduction, self._num_brackets = grace_epochs, reduction, num_brackets
        self._rungs: dict[tuple[int, int], dict[int, tuple[int, Scores]]] = {}

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Note scores; a trial is judged at its first scores in a rung, and by the same ones told again."""
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

    It compares where at least ``MIN_OTHERS`` have come as far.

    Args:
        grace_epochs: Epochs that every trial gets.
    """

    def __init__(self, grace_epochs: int) -> None:
        self._grace_epochs = grace_epochs
        self._curves: dict[int, dict[int, float]] = {}
        self._means: dict[int, dict[int, float]] = {}

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Note the score and compare with the trials that were scored at the same epoch."""
        curve = self._curves.setdefault(number, {})
        curve[epoch] = scores[0]
        means = self._means.setdefault(epoch, {})
        means[number] = statistics.fmean(curve.values())
        others = [mean for other, mean in means.items() if other != number]
        return (
            epoch < self._grace_epochs or len(others) < MIN_OTHERS or max(curve.values()) >= statistics.median(others)
        )


def num_brackets(search: Search, epochs: int) -> int:
    """Grace periods that hyperband tries: those that end before the training, and the first one at least."""
    ends = (search.grace_epochs * search.reduction**bracket for bracket in range(1, MAX_BRACKETS))
    return 1 + len([end for end in ends if end < epochs])


def make_stopping_rule(
    search: Search, curves: Iterable[tuple[int, Mapping[int, Scores]]], epochs: int
) -> StoppingRule | None:
    """The rule that a study asks for; None where every trial is trained to its end.

    Args:
        search: Names the scheduler.
        curves: Of the trials so far, as in the ledger: the rule decides as if it had seen them all.
        epochs: Of the longest training.
    """
    if search.scheduler == "none":
        return None
    brackets = num_brackets(search, epochs) if search.scheduler == "hyperband" else 1
    median = search.scheduler == "median"
    rule: StoppingRule = (
        Median(search.grace_epochs) if median else Asha(search.grace_epochs, search.reduction, brackets)
    )
    for number, curve in curves:
        for epoch, values in curve.items():
            rule.should_continue(number, epoch, signed(values, search.signs))
    return rule


def signed(values: Sequence[float], signs: Sequence[int]) -> Scores:
    """Objectives as scores, of which the larger is the better."""
    return tuple(sign * value for sign, value in zip(signs, values, strict=True))
