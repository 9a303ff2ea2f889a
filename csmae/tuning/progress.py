"""How far a search is: the state behind what is shown, without showing it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from csmae.tuning.budget import Budget
from csmae.tuning.events import Ended, Event, Reported, Started, Waiting
from csmae.tuning.ledger import last_values


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
class Progress:
    """Follows the events of one run of a search.

    Args:
        objective: Metric shown for each trial.
        sign: 1 where a larger objective is better, else -1.
        num_trials: Of the whole study, repetitions that confirm included.
        counts: Trials by state, those of earlier runs included.
        best: The best trial so far.
        budget: Of the study.
    """

    objective: str
    sign: int
    num_trials: int
    counts: Counter[str]
    best: TrialProgress | None
    budget: Budget
    trials: dict[int, TrialProgress] = field(default_factory=dict)
    epochs_done: int = 0
    first_epoch_at: float | None = None

    @classmethod
    def of(cls, budget: Budget) -> Progress:
        """What earlier runs of the study left."""
        ledger = budget.ledger
        states = Counter(trial.state.name for trial in ledger.trials() if trial.state.is_finished())
        best = next(iter(ledger.ranked()), None)
        search = ledger.study.search
        shown = (
            TrialProgress(best.number, best.params, 0, value=last_values(best)[0], state="COMPLETE") if best else None
        )
        repetitions = search.confirm.top * search.confirm.seeds if search.confirm else 0
        return cls(search.objective, search.signs[0], search.num_trials + repetitions, states, shown, budget)

    @property
    def running(self) -> list[TrialProgress]:
        """Trials at work, or waiting for room to go on, in order of their numbers."""
        return [trial for _, trial in sorted(self.trials.items()) if trial.state in ("running", "waiting")]

    @property
    def num_ended(self) -> int:
        """Trials that are over, those of earlier runs included."""
        return sum(self.counts.values())

    def follow(self, event: Event) -> bool:
        """Take in an event; returns whether it made a new best trial."""
        if isinstance(event, Started):
            self.trials[event.number] = TrialProgress(event.number, event.values, event.epochs)
            return False
        trial = self.trials[event.number]
        if isinstance(event, Reported):
            self._count(event.epoch - trial.epoch if trial.epoch else 1)
            trial.epoch, trial.value = event.epoch, event.metrics.get(self.objective, trial.value)
            return False
        if isinstance(event, Waiting):
            trial.state, trial.reason = "waiting", event.reason
            return False
        return self._end(trial, event)

    def _count(self, epochs: int) -> None:
        if self.first_epoch_at is None:
            self.first_epoch_at = time.monotonic()
        else:
            self.epochs_done += epochs

    def _end(self, trial: TrialProgress, event: Ended) -> bool:
        trial.state, trial.value, trial.reason = event.state, event.value, event.reason
        self.counts[event.state] += 1
        better = self.best is None or (self.sign * (event.value or 0) > self.sign * (self.best.value or 0))
        if event.state == "COMPLETE" and event.may_win and better:
            self.best = trial
            return True
        return False

    @property
    def epochs_per_s(self) -> float | None:
        """Epochs a second over all slots; None before there is a measure."""
        if self.first_epoch_at is None or not self.epochs_done:
            return None
        return self.epochs_done / (time.monotonic() - self.first_epoch_at)

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the mean length of the trials that ended; None before there is a measure."""
        rate, ended = self.epochs_per_s, [trial for trial in self.trials.values() if trial not in self.running]
        if rate is None or not self.trials:
            return None
        lengths = [trial.epoch for trial in ended] or [trial.epochs for trial in self.running]
        mean = sum(lengths) / len(lengths)
        to_start = max(0, self.num_trials - self.num_ended - len(self.running))
        return (to_start * mean + sum(max(0.0, mean - trial.epoch) for trial in self.running)) / rate
