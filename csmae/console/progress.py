"""The progress of a running search: the data behind the live view."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.trial import params_of, status_of
from csmae.tuning.events import EpochReported, SearchEvent, TrialEnded, TrialPaused, TrialStarted, TrialWaiting

NUM_ENDED = 8
"""How many ended trials are shown, the latest ones."""


@dataclass
class TrialProgress:
    """The progress of one trial."""

    number: int
    values: Mapping[str, Any]
    epochs: int
    """Epochs of the complete training."""
    until: int = 0
    """Epoch after which it pauses, or ends if its training is complete."""
    promoted: bool = False
    """Whether it continues after a pause."""
    epoch: int = 0
    """The last completed epoch."""
    status: TrialStatus = TrialStatus.RUNNING
    value: float | None = None
    """The last value of the objective."""
    reason: str | None = None
    """Why the trial waits, failed or was cut short."""


class SearchProgress:
    """The progress of one run of a search, updated by its events.

    Another thread may read during an update: collections are replaced, never changed. A reader's work does not grow with the
    number of trials.

    Args:
        budget: What the search has used. Its trial store holds the trials of earlier runs.
    """

    def __init__(self, budget: Budget) -> None:
        trial_store = budget.trial_store
        self.budget, self.study = budget, trial_store.study
        search = self.study.search
        self.objective = search.objective
        confirmations = search.confirm.top * search.confirm.seeds if search.confirm else 0
        self.num_trials = search.num_trials + confirmations
        """Trials of the whole study, confirmations included."""
        statuses = {trial.number: status_of(trial) for trial in trial_store.trials()}
        unfinished = (TrialStatus.RUNNING, TrialStatus.WAITING)
        self.counts: Counter[TrialStatus] = Counter(s for s in statuses.values() if s not in unfinished)
        """Ended and paused trials by status, those of earlier runs included."""
        self._paused = {number for number, status in statuses.items() if status is TrialStatus.PAUSED}
        self.best = _best(trial_store)
        """The trial that would be the champion now."""
        self.running: tuple[TrialProgress, ...] = ()
        """Running and waiting trials, ordered by number."""
        self.ended: tuple[TrialProgress, ...] = ()
        """The last ``NUM_ENDED`` trials that ended or paused."""
        self.num_started_here = 0
        """Trials that started in this run, without resumed ones."""
        self.num_ended_here = 0
        """Trials that ended in this run."""
        self.ended_epochs = 0
        """Epochs of the trials that ended in this run."""
        self.epochs_done = 0
        """Epochs after the first one of this run."""
        self.first_epoch_at: float | None = None
        """When the first epoch of this run was completed, in seconds of ``time.monotonic``."""

    @property
    def num_ended(self) -> int:
        """Trials that have ended or paused, those of earlier runs included."""
        return sum(self.counts.values())

    def update(self, event: SearchEvent) -> bool:
        """Apply an event; return whether there is a new best trial."""
        if isinstance(event, TrialStarted):
            self._start(event)
            return False
        trial = self.trial(event.number)
        if isinstance(event, EpochReported):
            self._count(event.epoch - trial.epoch if trial.epoch else 1)
            trial.epoch, trial.value = event.epoch, event.metrics.get(self.objective, trial.value)
            return False
        if isinstance(event, TrialWaiting):
            trial.status, trial.reason = TrialStatus.WAITING, event.reason
            self._set_running(trial)
            return False
        if isinstance(event, TrialPaused):
            trial.status = TrialStatus.PAUSED
            self._show_as_ended(trial)
            self._paused.add(trial.number)
            self.counts = self.counts + Counter([TrialStatus.PAUSED])
            return False
        return self._end(trial, event)

    def _start(self, event: TrialStarted) -> None:
        self._end_pause(event.number)
        self.num_started_here += not event.resumed
        self.ended = tuple(trial for trial in self.ended if trial.number != event.number)
        self._set_running(TrialProgress(event.number, event.values, event.epochs, event.until, event.promoted))

    def _end_pause(self, number: int) -> None:
        if number in self._paused:
            self._paused.remove(number)
            self.counts = self.counts - Counter([TrialStatus.PAUSED])

    def trial(self, number: int) -> TrialProgress:
        """Find a running or recently ended trial; any other trial has only its number."""
        found = (trial for trial in (*self.running, *reversed(self.ended)) if trial.number == number)
        return next(found, TrialProgress(number, {}, 0))

    def _set_running(self, trial: TrialProgress) -> None:
        self.running = tuple(sorted((*self._others(trial.number), trial), key=lambda running: running.number))

    def _show_as_ended(self, trial: TrialProgress) -> None:
        earlier = (ended for ended in self.ended if ended.number != trial.number)
        self.running, self.ended = tuple(self._others(trial.number)), (*earlier, trial)[-NUM_ENDED:]

    def _others(self, number: int) -> Iterator[TrialProgress]:
        return (trial for trial in self.running if trial.number != number)

    def _count(self, epochs: int) -> None:
        if self.first_epoch_at is None:
            self.first_epoch_at = time.monotonic()
        else:
            self.epochs_done += epochs

    def _end(self, trial: TrialProgress, event: TrialEnded) -> bool:
        self._end_pause(event.number)
        trial.status, trial.value, trial.reason = event.status, event.value, event.reason
        self._show_as_ended(trial)
        self.num_ended_here, self.ended_epochs = self.num_ended_here + 1, self.ended_epochs + trial.epoch
        self.counts = self.counts + Counter([event.status])
        if event.status is not TrialStatus.COMPLETE:
            return False
        before, self.best = self.best, _best(self.budget.trial_store)
        return self.best is not None and (before is None or before.number != self.best.number)

    @property
    def epochs_per_s(self) -> float | None:
        """Epochs per second of all trials together; None until it can be measured."""
        if self.first_epoch_at is None or not self.epochs_done:
            return None
        return self.epochs_done / (time.monotonic() - self.first_epoch_at)

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds until the search ends, from the mean length of ended trials; None until it can be measured.

        Where trials pause, from the epochs of this run for each trial that it started, those of promoted ones included.
        """
        rate, running, num_ended = self.epochs_per_s, self.running, self.num_ended_here
        if rate is None or not (running or num_ended):
            return None
        num_pending = max(0, self.num_trials - self.num_ended - len(running))
        if self.counts[TrialStatus.PAUSED]:
            return num_pending * self.epochs_done / max(1, self.num_started_here) / rate
        mean = self.ended_epochs / num_ended if num_ended else sum(trial.epochs for trial in running) / len(running)
        return (num_pending * mean + sum(max(0.0, mean - trial.epoch) for trial in running)) / rate


def _best(trial_store: TrialStore) -> TrialProgress | None:
    best = next(iter(leaderboard(trial_store.optuna_study).entries), None)
    if best is None:
        return None
    return TrialProgress(best.trial.number, params_of(best.trial), 0, status=TrialStatus.COMPLETE, value=best.mean)
