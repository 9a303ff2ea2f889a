"""Ray Tune's scheduler: it stops the trials that the strategy does not let continue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from csmae.tuning.searcher import StudySearcher


class StrategyScheduler(FIFOScheduler):  # type: ignore[misc]
    """Stops trials as the searcher's strategy decides. Runs in the driver.

    Args:
        searcher: Of the same search.
    """

    def __init__(self, searcher: StudySearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune's snapshots are not used."""
        return {}

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """Choose none: Tune starts pending trials itself, while ``FIFOScheduler`` would iterate over all trials of the search."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Decide whether a trial continues after an epoch."""
        continues = self._searcher.should_continue(trial.trial_id, result)
        return str(TrialScheduler.CONTINUE if continues else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Let the strategy see the scores of an assignment's last epoch, which Tune reports to nobody else."""
        self._searcher.should_continue(trial.trial_id, result)
