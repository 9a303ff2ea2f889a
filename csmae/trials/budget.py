"""What a study may spend and has spent, over all its runs."""

from __future__ import annotations

import time

import optuna

from csmae.study.options import seconds
from csmae.trials.store import TrialStore

ELAPSED_S = "runs_s"
"""User attribute of a study: seconds that its runs took. Trials have ``gpu_s`` or ``worker_s``, of all their workers."""

WRITE_EVERY_S = 10.0
"""What a killed driver may forget."""


class Budget:
    """Counts from the moment it is made.

    Args:
        ledger: Of the study; what was spent is on record in it.
        gpus_per_worker: Of a trial's workers; where they have none, workers are counted.
    """

    def __init__(self, trial_store: TrialStore, gpus_per_worker: float = 0.0) -> None:
        self.unit = "GPU" if gpus_per_worker else "worker"
        self.trial_store, self._units = (
            trial_store,
            trial_store.study.search.workers_per_trial * (gpus_per_worker or 1.0),
        )
        self._name = f"{self.unit.lower()}_s"
        self._runs = float(trial_store.optuna_study.user_attrs.get(ELAPSED_S, 0.0))
        self._trials = sum(float(trial.user_attrs.get(self._name, 0.0)) for trial in trial_store.all_trials())
        self._start = self._written = time.monotonic()
        self._running: dict[int, tuple[optuna.Trial, float | None]] = {}
        """By number, trials and since when their workers hold resources for which nothing was charged yet."""

    def begin(self, trial: optuna.Trial) -> None:
        """A trial begins; its workers have to wait for resources first."""
        self._running[trial.number] = trial, None

    def hold(self, trial: optuna.Trial, holding: bool) -> None:
        """A trial's workers hold resources from now on, or no longer."""
        self._charge(trial.number)
        self._running[trial.number] = trial, time.monotonic() if holding else None

    def end(self, trial: optuna.Trial) -> None:
        """A trial's workers are done with it."""
        self._charge(trial.number)
        del self._running[trial.number]

    def tick(self) -> None:
        """Write down now and then what is spent."""
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write down what the running trials and the study's runs took."""
        for number in self._running:
            self._charge(number)
        self.trial_store.optuna_study.set_user_attr(ELAPSED_S, self.seconds)
        self._written = time.monotonic()

    def _charge(self, number: int) -> None:
        trial, since = self._running[number]
        if since is None:
            return
        now = time.monotonic()
        spent = (now - since) * self._units
        trial.set_user_attr(self._name, float(trial.user_attrs.get(self._name, 0.0)) + spent)
        self._running[number], self._trials = (trial, now), self._trials + spent

    @property
    def seconds(self) -> float:
        """Time that the study's runs took, this one included."""
        return self._runs + time.monotonic() - self._start

    @property
    def hours(self) -> float:
        """GPU-hours, or worker-hours where there are no GPUs, the running trials included."""
        now = time.monotonic()
        running = tuple(self._running.values())  # at once: the view's thread asks, too
        open_s = sum(now - since for _, since in running if since is not None)
        return (self._trials + open_s * self._units) / 3600

    def over(self) -> str | None:
        """Which limit is reached, in words; None for none."""
        search = self.trial_store.study.search
        if search.time_limit and self.seconds >= seconds(search.time_limit):
            return f"the time limit of {search.time_limit} is reached"
        if search.gpu_hours and self.hours >= search.gpu_hours:
            return f"the budget of {search.gpu_hours:g} {self.unit}-hours is spent"
        return None
