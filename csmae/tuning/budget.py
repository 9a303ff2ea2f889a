"""What a study may spend and has spent, over all its runs."""

from __future__ import annotations

import time

import optuna

from csmae.tuning.ledger import Ledger
from csmae.tuning.options import seconds

SPENT = "spent_s"
"""User attribute, of a trial: seconds that its workers were at it; of the study: seconds that its runs took."""

WRITE_EVERY_S = 10.0
"""What a killed driver may forget of a trial's cost."""


class Budget:
    """Counts from the moment it is made.

    Args:
        ledger: Of the study; what was spent is on record in it.
        gpus_per_worker: Of a trial's workers; where they have none, workers are counted.
    """

    def __init__(self, ledger: Ledger, gpus_per_worker: float = 0.0) -> None:
        self.unit = "GPU" if gpus_per_worker else "worker"
        self.ledger, self._units = ledger, ledger.study.search.workers_per_trial * (gpus_per_worker or 1.0)
        self._before = float(ledger.optuna.user_attrs.get(SPENT, 0.0))
        self._trials = sum(float(trial.user_attrs.get(SPENT, 0.0)) for trial in ledger.trials())
        self._start = time.monotonic()
        self._since: dict[int, float] = {}

    def begin(self, trial: optuna.Trial) -> None:
        """A trial's workers begin."""
        self._since[trial.number] = time.monotonic()

    def count(self, trial: optuna.Trial) -> None:
        """Write down now and then what a running trial spent."""
        if time.monotonic() - self._since[trial.number] > WRITE_EVERY_S:
            self._write(trial)
            self.close()

    def end(self, trial: optuna.Trial) -> None:
        """A trial's workers are done with it."""
        self._write(trial)
        del self._since[trial.number]

    def _write(self, trial: optuna.Trial) -> None:
        now = time.monotonic()
        spent = now - self._since[trial.number]
        self._since[trial.number] = now
        self._trials += spent
        trial.set_user_attr(SPENT, float(trial.user_attrs.get(SPENT, 0.0)) + spent)

    def close(self) -> None:
        """Write down what the study's runs took."""
        self.ledger.optuna.set_user_attr(SPENT, self.seconds)

    @property
    def seconds(self) -> float:
        """Time that the study's runs took, this one included."""
        return self._before + time.monotonic() - self._start

    @property
    def hours(self) -> float:
        """GPU-hours, or worker-hours where there are no GPUs, the running trials included."""
        now = time.monotonic()
        return (self._trials + sum(now - since for since in self._since.values())) * self._units / 3600

    def over(self) -> str | None:
        """Which limit is reached, in words; None for none."""
        search = self.ledger.study.search
        if search.time_limit and self.seconds >= seconds(search.time_limit):
            return f"the time limit of {search.time_limit} is reached"
        if search.gpu_hours and self.hours >= search.gpu_hours:
            return f"the budget of {search.gpu_hours:g} {self.unit}-hours is spent"
        return None
