"""Ray Tune's scheduler on top of an early stopping rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from csmae.trials.pareto import as_scores
from csmae.tuning.early_stopping import StoppingRule


class StoppingScheduler(FIFOScheduler):  # type: ignore[misc]
    """Stops trials as an early stopping rule decides. Runs in the driver.

    Args:
        rule: Decides which trials continue.
        keys: The objectives' keys in Tune's flattened result.
        signs: For each objective, 1 if larger is better, else -1.
    """

    def __init__(self, rule: StoppingRule, keys: Sequence[str], signs: Sequence[int]) -> None:
        super().__init__()
        self._rule, self._keys, self._signs = rule, keys, signs

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Choose none: Tune starts pending trials itself, while ``FIFOScheduler`` would iterate over all trials of the search."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Decide whether a trial continues after an epoch.

        Starting points and confirmations always continue, but the others are compared with their scores.
        """
        continues = self._should_continue(trial, result) or trial.config["never_stop"]
        return str(TrialScheduler.CONTINUE if continues else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Record the scores of a trial's last epoch, with which others are compared."""
        self._should_continue(trial, result)

    def _should_continue(self, trial: Trial, result: Mapping[str, Any]) -> bool:
        """Ask the rule; results without scores, or with scores that are not finite, stop no trial."""
        values = [result.get(key, math.nan) for key in self._keys]
        if "epoch" not in result or not all(map(math.isfinite, values)):
            return True
        return self._rule.should_continue(trial.config["number"], result["epoch"], as_scores(values, self._signs))
