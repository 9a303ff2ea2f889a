"""Strategies that train every configuration in one go, unless an early stopping rule ends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csmae.study.options import Search
from csmae.trial_status import TrialStatus
from csmae.tuning.early_stopping import StoppingRule, grace_epochs
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, Scores, TrialView


class RuleStrategy:
    """Trains every configuration to its end, unless a rule stops it; without a rule, to its end whatever its scores.

    Such a strategy never pauses a trial. Those that another one has paused before, or whose training has become longer, are
    continued as far as the rule allows; the others stay paused.

    Args:
        search: The settings of the search.
        rule: None stops no trial.
        epochs: Epochs of the longest training in the space.
    """

    def __init__(self, search: Search, rule: StoppingRule | None, epochs: int) -> None:
        self._search, self._rule, self._epochs = search, rule, epochs

    def next(self, trials: Sequence[TrialView], num_new: int) -> Decision | None:
        """Continue paused trials in the order of their numbers, then train new configurations."""
        for trial in trials:
            if trial.status is TrialStatus.PAUSED and (trial.never_stop or self._continues(trial)):
                return Resume(trial.number, trial.epochs, "not stopped so far")
        return NewTrial(self._epochs, "new configuration") if num_new else None

    def _continues(self, trial: TrialView) -> bool:
        return trial.never_stop or all(
            self.should_continue(trial.number, epoch, scores) for epoch, scores in trial.scores.items()
        )

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Ask the rule."""
        return self._rule is None or self._rule.should_continue(number, epoch, scores)

    def expectation(self, trials: Sequence[TrialView]) -> Mapping[int, float]:
        """Paused trials by their last scores' first objective; those without scores come last."""
        paused = [trial for trial in trials if trial.status is TrialStatus.PAUSED]
        return {trial.number: list(trial.scores.values())[-1][0] if trial.scores else float("-inf") for trial in paused}

    def describe(self) -> list[str]:
        """Explain the rule."""
        search, new = self._search, f"Each of {self._search.num_trials} configurations is trained in one go"
        first = grace_epochs(search)
        grace = f"{first} epoch{'s' if first > 1 else ''}"
        if search.strategy == "none":
            return [f"{new}, to its last epoch."]
        if search.strategy == "median":
            return [f"{new}; one whose best score is below the median of the others stops, after {grace} or later."]
        halving = f"at each rung, the best 1/{search.reduction} of the trials so far continue"
        if search.strategy == "hyperband":
            return [
                f"{new}; {halving}.",
                "The trials are divided into brackets with different first rungs, and the last bracket stops no trial.",
            ]
        return [f"{new}; {halving}. The rungs are after {grace} and {search.reduction} times as many each."]
