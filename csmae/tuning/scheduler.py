"""Early stopping by epoch: which trials go on, from the scores of all trials at the same age."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from csmae.tuning.study import Search

NUM_BRACKETS = 3
"""Grace periods that hyperband tries side by side."""


class Rule(Protocol):
    """Decides on trials from their scores, larger being better. Its state is the scores it was told."""

    def keeps(self, number: int, epoch: int, score: float) -> bool:
        """Note a trial's score after an epoch and say whether the trial goes on."""


class Asha:
    """Asynchronous successive halving (arXiv 1810.05934): at each rung, the best 1/reduction of those seen go on.

    Args:
        grace_epochs: The first rung.
        reduction: Factor from a rung to the next.
        num_brackets: Trials take turns; each further bracket starts one rung later (hyperband).
    """

    def __init__(self, grace_epochs: int, reduction: int, num_brackets: int = 1) -> None:
        self._grace_epochs, self._reduction, self._num_brackets = grace_epochs, reduction, num_brackets
        self._rungs: dict[tuple[int, int], dict[int, float]] = {}

    def keeps(self, number: int, epoch: int, score: float) -> bool:
        """Note a score; a trial is judged once a rung, at its first score there."""
        bracket = number % self._num_brackets
        rung = self._rung_below(epoch, bracket)
        if rung is None:
            return True
        scores = self._rungs.setdefault((bracket, rung), {})
        if number in scores:
            return True
        scores[number] = score
        better = sum(other > score for other in scores.values())
        return better < math.ceil(len(scores) / self._reduction)

    def _rung_below(self, epoch: int, bracket: int) -> int | None:
        rung: int = self._grace_epochs * self._reduction**bracket
        if epoch < rung:
            return None
        while rung * self._reduction <= epoch:
            rung *= self._reduction
        return rung


class Median:
    """Stops a trial whose best score is below the median of the other trials' mean scores so far (Vizier, 2017).

    Args:
        grace_epochs: Epochs that every trial gets.
    """

    def __init__(self, grace_epochs: int) -> None:
        self._grace_epochs = grace_epochs
        self._scores: dict[int, dict[int, float]] = {}

    def keeps(self, number: int, epoch: int, score: float) -> bool:
        """Note a score and compare with the trials that have come as far."""
        self._scores.setdefault(number, {})[epoch] = score
        others = [
            statistics.fmean(value for at, value in scores.items() if at <= epoch)
            for other, scores in self._scores.items()
            if other != number and max(scores) >= epoch
        ]
        if epoch < self._grace_epochs or not others:
            return True
        return max(self._scores[number].values()) >= statistics.median(others)


def make_rule(search: Search) -> Rule | None:
    """The rule that a study asks for; None where every trial is trained to its end."""
    if search.scheduler == "none":
        return None
    if search.scheduler == "median":
        return Median(search.grace_epochs)
    return Asha(search.grace_epochs, search.reduction, NUM_BRACKETS if search.scheduler == "hyperband" else 1)


class EpochScheduler(FIFOScheduler):  # type: ignore[misc]
    """Puts a rule's decisions into Tune's words.

    Args:
        rule: Decides; already told what earlier runs of the study saw.
        metric: Flattened key of the objective in a result.
        sign: 1 where a larger objective is better, else -1.
    """

    def __init__(self, rule: Rule, metric: str, sign: int) -> None:
        super().__init__()
        self._rule, self._key, self._sign = rule, metric, sign

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Leave the order to Tune's own queue, without a look at every trial there ever was."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Stop the trial or let it go on; an epoch without a score, or with none that compares, decides nothing."""
        score = result.get(self._key)
        if score is None or not math.isfinite(score):
            return str(TrialScheduler.CONTINUE)
        number = trial.config["number"]
        keeps = self._rule.keeps(number, result["epoch"], self._sign * score)
        return str(TrialScheduler.CONTINUE if keeps or trial.config["start"] else TrialScheduler.STOP)
