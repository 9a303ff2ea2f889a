"""How far a search is: the state behind what is shown, without showing it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from csmae.trials.budget import Budget
from csmae.trials.leaderboard import entries
from csmae.trials.store import TrialStore
from csmae.trials.trial import state_of
from csmae.tuning.events import EpochReported, Event, TrialEnded, TrialStarted, TrialWaiting

NUM_ENDED = 8
"""Trials that are over and still known, the latest."""


@dataclass
class TrialProgress:
    """One trial as the view shows it."""

    number: int
    values: Mapping[str, Any]
    epochs: int
    epoch: int = 0
    state: str = "running"
    value: float | None = None
    reason: str | None = None


@dataclass
class SearchProgress:
    """Follows the events of one run of a search.

    Another thread may read while an event is taken in: the collections are replaced, never changed. What it reads is of
    the trials that run and of a few that ended, however many there were.

    Args:
        objective: Metric shown for each trial.
        num_trials: Of the whole study, repetitions that confirm included.
        counts: Trials by state, those of earlier runs included.
        best: The best trial so far.
        budget: Of the study.
        running: Trials at work, or waiting for room to go on, in order of their numbers.
        ended: The latest of those that are over.
        num_ended_here: Trials that ended in this run.
        ended_epochs: Their epochs together.
        epochs_done: Since the first epoch of this run.
        first_epoch_at: When that one was done.
    """

    objective: str
    num_trials: int
    counts: Mapping[str, int]
    best: TrialProgress | None
    budget: Budget
    running: tuple[TrialProgress, ...] = ()
    ended: tuple[TrialProgress, ...] = ()
    num_ended_here: int = 0
    ended_epochs: int = 0
    epochs_done: int = 0
    first_epoch_at: float | None = None

    @classmethod
    def from_budget(cls, budget: Budget) -> SearchProgress:
        """What earlier runs of the study left."""
        trial_store = budget.trial_store
        states = Counter(state_of(trial) for trial in trial_store.trials() if trial.state.is_finished())
        search, shown = trial_store.study.search, _best(trial_store)
        repetitions = search.confirm.top * search.confirm.seeds if search.confirm else 0
        return cls(search.objective, search.num_trials + repetitions, states, shown, budget)

    @property
    def num_ended(self) -> int:
        """Trials that are over, those of earlier runs included."""
        return sum(self.counts.values())

    def update(self, event: Event) -> bool:
        """Take in an event; returns whether it made a new best trial."""
        if isinstance(event, TrialStarted):
            self._put(TrialProgress(event.number, event.values, event.epochs))
            return False
        trial = self.trial(event.number)
        if isinstance(event, EpochReported):
            self._count(event.epoch - trial.epoch if trial.epoch else 1)
            trial.epoch, trial.value = event.epoch, event.metrics.get(self.objective, trial.value)
            return False
        if isinstance(event, TrialWaiting):
            trial.state, trial.reason = "waiting", event.reason
            self._put(trial)
            return False
        return self._end(trial, event)

    def trial(self, number: int) -> TrialProgress:
        """A trial that runs, or one of those that ended last; one that was not told of before has nothing but its number."""
        found = (trial for trial in (*self.running, *reversed(self.ended)) if trial.number == number)
        return next(found, TrialProgress(number, {}, 0))

    def _put(self, trial: TrialProgress) -> None:
        self.running = tuple(sorted((*self._others(trial.number), trial), key=lambda running: running.number))

    def _others(self, number: int) -> Iterator[TrialProgress]:
        return (trial for trial in self.running if trial.number != number)

    def _count(self, epochs: int) -> None:
        if self.first_epoch_at is None:
            self.first_epoch_at = time.monotonic()
        else:
            self.epochs_done += epochs

    def _end(self, trial: TrialProgress, event: TrialEnded) -> bool:
        trial.state, trial.value, trial.reason = event.state, event.value, event.reason
        self.running, self.ended = tuple(self._others(trial.number)), (*self.ended, trial)[-NUM_ENDED:]
        self.num_ended_here, self.ended_epochs = self.num_ended_here + 1, self.ended_epochs + trial.epoch
        self.counts = {**self.counts, event.state: self.counts.get(event.state, 0) + 1}
        before, self.best = self.best, _best(self.budget.trial_store) if event.state == "COMPLETE" else self.best
        return self.best is not None and (before is None or before.number != self.best.number)

    @property
    def epochs_per_s(self) -> float | None:
        """Epochs a second over all slots; None before there is a measure."""
        if self.first_epoch_at is None or not self.epochs_done:
            return None
        return self.epochs_done / (time.monotonic() - self.first_epoch_at)

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the mean length of the trials that ended; None before there is a measure."""
        rate, running, num_ended = self.epochs_per_s, self.running, self.num_ended_here
        if rate is None or not (running or num_ended):
            return None
        mean = self.ended_epochs / num_ended if num_ended else sum(trial.epochs for trial in running) / len(running)
        to_start = max(0, self.num_trials - self.num_ended - len(running))
        return (to_start * mean + sum(max(0.0, mean - trial.epoch) for trial in running)) / rate


def _best(trial_store: TrialStore) -> TrialProgress | None:
    """The trial that would be the champion now."""
    best = next(iter(entries(trial_store)), None)
    if best is None:
        return None
    return TrialProgress(best.trial.number, trial_store.values(best.trial), 0, state="COMPLETE", value=best.mean)
