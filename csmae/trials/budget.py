"""What a study may use and has used, over all its runs."""

from __future__ import annotations

import time

import optuna

from csmae.study.options import seconds
from csmae.trials.attributes import ELAPSED_S, GPU_S, WORKER_S
from csmae.trials.store import TrialStore

WRITE_EVERY_S = 10.0
"""Time that a killed driver may leave unrecorded."""


class Budget:
    """Measures the time of the study's runs and of its trials' workers. Starts when it is created; lives in the driver.

    Args:
        trial_store: The study's; holds what earlier runs used.
        gpus_per_worker: Without GPUs, workers are counted.
    """

    def __init__(self, trial_store: TrialStore, gpus_per_worker: float = 0.0) -> None:
        self.trial_store = trial_store
        self.unit, self._attribute = ("GPU", GPU_S) if gpus_per_worker else ("worker", WORKER_S)
        self._units_per_trial = trial_store.study.search.workers_per_trial * (gpus_per_worker or 1.0)
        self._earlier_runs_s = float(trial_store.optuna_study.user_attrs.get(ELAPSED_S, 0.0))
        self._recorded_s = sum(float(trial.user_attrs.get(self._attribute, 0.0)) for trial in trial_store.all_trials())
        self._start = self._written = time.monotonic()
        self._running: dict[int, tuple[optuna.Trial, float | None]] = {}
        """By number: the trial, and since when its workers hold resources that are not recorded yet."""

    def begin(self, trial: optuna.Trial) -> None:
        """Note that a trial starts; its workers wait for resources first."""
        self._running[trial.number] = trial, None

    def hold(self, trial: optuna.Trial, holding: bool) -> None:
        """Note that a trial's workers hold resources from now on, or no longer."""
        self._record(trial.number)
        self._running[trial.number] = trial, time.monotonic() if holding else None

    def end(self, trial: optuna.Trial) -> None:
        """Note that a trial's workers have left it."""
        self._record(trial.number)
        del self._running[trial.number]

    def tick(self) -> None:
        """Write to the trial store if the last time was ``WRITE_EVERY_S`` ago."""
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write what the running trials and the study's runs used."""
        for number in self._running:
            self._record(number)
        self.trial_store.optuna_study.set_user_attr(ELAPSED_S, self.seconds)
        self._written = time.monotonic()

    def _record(self, number: int) -> None:
        trial, since = self._running[number]
        if since is None:
            return
        now = time.monotonic()
        used = (now - since) * self._units_per_trial
        trial.set_user_attr(self._attribute, float(trial.user_attrs.get(self._attribute, 0.0)) + used)
        self._running[number], self._recorded_s = (trial, now), self._recorded_s + used

    @property
    def seconds(self) -> float:
        """Time of the study's runs, including this one."""
        return self._earlier_runs_s + time.monotonic() - self._start

    @property
    def hours(self) -> float:
        """GPU-hours, or worker-hours without GPUs, including the running trials."""
        now = time.monotonic()
        running = tuple(self._running.values())  # one atomic copy: the view's thread reads this too
        unrecorded_s = sum(now - since for _, since in running if since is not None)
        return (self._recorded_s + unrecorded_s * self._units_per_trial) / 3600

    def reached_limit(self) -> str | None:
        """The limit that is reached, as a text; None if there is none."""
        search = self.trial_store.study.search
        if search.time_limit and self.seconds >= seconds(search.time_limit):
            return f"the time limit of {search.time_limit} is reached"
        if search.gpu_hours and self.hours >= search.gpu_hours:
            return f"the budget of {search.gpu_hours:g} {self.unit}-hours is spent"
        return None
