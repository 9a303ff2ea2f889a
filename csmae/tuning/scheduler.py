"""Early stopping by epoch: which trials go on, from the scores of all trials at the same age."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from csmae.tuning.early_stopping import StoppingRule, signed


class StoppingScheduler(FIFOScheduler):  # type: ignore[misc]
    """Puts a rule's decisions into Tune's words.

    Args:
        rule: Decides.
        keys: Of the objectives in a flattened result.
        signs: For each, 1 where larger is better, else -1.
    """

    def __init__(self, rule: StoppingRule, keys: Sequence[str], signs: Sequence[int]) -> None:
        super().__init__()
        self._rule, self._keys, self._signs = rule, keys, signs

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Leave the order to Tune's own queue, without a look at every trial there ever was."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Stop the trial or let it go on; an epoch without scores, or with some that do not compare, decides nothing.

        A starting point is never stopped, but its scores are there for the others to compare with.
        """
        keeps = self._keeps(trial, result) or trial.config["start"]
        return str(TrialScheduler.CONTINUE if keeps else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Note the last epoch, for the others to compare with."""
        self._keeps(trial, result)

    def _keeps(self, trial: Trial, result: Mapping[str, Any]) -> bool:
        values = [result.get(key, math.nan) for key in self._keys]
        if "epoch" not in result or not all(map(math.isfinite, values)):
            return True
        return self._rule.should_continue(trial.config["number"], result["epoch"], signed(values, self._signs))
