"""How the trials stand at the end: by their score, or by the mean over seeds where they were trained again."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import optuna
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


MIN_FOR_IMPORTANCE = 8
"""Finished trials that it takes to say what mattered."""


def importances(ledger: Ledger) -> dict[str, float]:
    """Share of each parameter in what made trials good at the first objective, largest first.

    Empty where there are too few trials, or parameters, to tell. Source: PED-ANOVA (arXiv 2304.10255), which copes
    with conditions.
    """
    trials = [trial for trial in ledger.explored() if trial.state is TrialState.COMPLETE]
    if len(trials) < MIN_FOR_IMPORTANCE or len(ledger.study.space.domains) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        return optuna.importance.get_param_importances(
            ledger.optuna, evaluator=evaluator, target=lambda trial: trial.values[0]
        )
    except (ValueError, RuntimeError):  # Optuna's way to say that the values do not differ
        return {}
