"""How the trials stand at the end: by their score, or by the mean over seeds where they were trained again."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from csmae.tuning.ledger import CONFIRMS, Ledger, last_values


@dataclass(frozen=True)
class Standing:
    """A configuration's place."""

    trial: FrozenTrial
    """The trial that found it."""
    scores: tuple[float, ...]
    """First objective: of the trial, then of its repetitions."""

    @property
    def num_seeds(self) -> int:
        """Trainings that the mean is over."""
        return len(self.scores)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (of a sample); 0 for one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def standings(ledger: Ledger) -> list[Standing]:
    """The configurations, best first. Those trained again come before the others, by their mean."""
    again: dict[int, list[float]] = {}
    for trial in ledger.trials():
        if CONFIRMS in trial.user_attrs and trial.state is TrialState.COMPLETE:
            again.setdefault(trial.user_attrs[CONFIRMS], []).append(trial.values[0])
    found = [Standing(t, (last_values(t)[0], *again.get(t.number, ()))) for t in ledger.ranked()]
    confirmed = [standing for standing in found if standing.num_seeds > 1]
    sign = ledger.study.search.signs[0]
    confirmed.sort(key=lambda standing: -sign * standing.mean)
    return confirmed + [standing for standing in found if standing.num_seeds == 1]
