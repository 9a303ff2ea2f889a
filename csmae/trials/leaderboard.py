"""Which trial is the best. Everything that names or shows the best trial reads it here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from csmae.trial_status import TrialStatus
from csmae.trials.attributes import CONFIRMING, FINALISTS
from csmae.trials.pareto import as_scores, on_pareto_front, order
from csmae.trials.trial import (
    completed_epochs,
    confirmed_number,
    constraint_violations,
    curve,
    is_cut_short,
    last_values,
    result_of,
    status_of,
)


@dataclass(frozen=True)
class LeaderboardEntry:
    """A configuration that can win."""

    trial: FrozenTrial
    """The trial that found it."""
    scores: tuple[float, ...]
    """First objective: of the trial, then of its confirmations."""
    is_finalist: bool
    """Whether it was chosen for confirmation."""

    @property
    def num_seeds(self) -> int:
        """Number of trainings in the mean."""
        return len(self.scores)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (of a sample); 0 for one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


@dataclass(frozen=True)
class Leaderboard:
    """A study's trials: those that can win, best first, and why the others cannot."""

    study_name: str
    trials: list[FrozenTrial]
    """All trials that the study trained or trains, in the order of their numbers."""
    objectives: Mapping[str, str]
    """``maximize`` or ``minimize`` by name, the first objective first."""
    entries: list[LeaderboardEntry]
    """Best first."""
    ranked: list[FrozenTrial]
    """The entries' trials by their own scores alone, best first."""
    front: frozenset[int]
    """Numbers of the trials on the Pareto front, by their own scores."""
    confirms: Mapping[int, int]
    """By number of a confirmation, the trial that it repeats."""
    violated_constraints: Mapping[int, tuple[str, ...]]
    """By number of a trial, the constraints that it violates."""

    @property
    def objective(self) -> str:
        """The first objective."""
        return next(iter(self.objectives))


def leaderboard(study: optuna.Study) -> Leaderboard:
    """Rank the trials of a study.

    Trials that were trained to their last epoch and violate no constraint can win. If there are none, those that were complete
    before ``train.epochs`` grew; if there are none either, paused trials and those that a budget cut short. They are ordered by
    their scores, with several objectives by Pareto front. Finalists come before all others, by the mean of the first
    objective over the seeds that each has so far: one that its confirmation disproved falls behind one that
    is not confirmed yet. If the study no longer confirms, every trial counts with its mean in place of its own score.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if status_of(trial).is_trained]
    confirms = {trial.number: number for trial in trials if (number := confirmed_number(trial)) is not None}
    confirmations: dict[int, list[float]] = {}
    for trial in trials:
        if trial.number in confirms and (result := result_of(trial)) is not None:
            confirmations.setdefault(confirms[trial.number], []).append(result[0])
    signs = [1 if direction is StudyDirection.MAXIMIZE else -1 for direction in study.directions]
    eligible = _eligible([trial for trial in trials if trial.number not in confirms])
    own_scores = [as_scores(last_values(trial), signs) for trial in eligible]
    ranked = [eligible[index] for index in order(own_scores)]
    finalists = {*study.user_attrs.get(FINALISTS, ()), *confirmations}
    entries = [
        LeaderboardEntry(t, (last_values(t)[0], *confirmations.get(t.number, ())), t.number in finalists)
        for t in ranked
    ]
    directions = [direction.name.lower() for direction in study.directions]
    sort = _finalists_first if study.user_attrs.get(CONFIRMING, True) else _by_mean
    on_front = on_pareto_front(own_scores)
    return Leaderboard(
        study_name=study.study_name,
        trials=trials,
        objectives=dict(zip(study.metric_names or ["objective"], directions, strict=False)),
        entries=sort(entries, signs),
        ranked=ranked,
        front=frozenset(trial.number for trial, is_on_front in zip(eligible, on_front, strict=True) if is_on_front),
        confirms=confirms,
        violated_constraints={trial.number: names for trial in trials if (names := violated_constraints(trial))},
    )


def _eligible(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    kept = [trial for trial in trials if not violated_constraints(trial)]
    complete = [trial for trial in kept if status_of(trial) is TrialStatus.COMPLETE]
    longest = max(map(completed_epochs, kept), default=0)
    if not complete and longest:
        complete = [trial for trial in kept if completed_epochs(trial) == longest]
    return complete or [trial for trial in kept if is_cut_short(trial) or _is_paused_with_score(trial)]


def _is_paused_with_score(trial: FrozenTrial) -> bool:
    return status_of(trial) is TrialStatus.PAUSED and bool(curve(trial))


def _finalists_first(entries: list[LeaderboardEntry], signs: list[int]) -> list[LeaderboardEntry]:
    finalists = [entry for entry in entries if entry.is_finalist]
    finalists.sort(key=lambda entry: (-signs[0] * entry.mean, -entry.num_seeds))
    return finalists + [entry for entry in entries if not entry.is_finalist]


def _by_mean(entries: list[LeaderboardEntry], signs: list[int]) -> list[LeaderboardEntry]:
    scores = [as_scores((entry.mean, *last_values(entry.trial)[1:]), signs) for entry in entries]
    return [entries[index] for index in order(scores)]


def violated_constraints(trial: FrozenTrial) -> tuple[str, ...]:
    """Constraints that a trial violates, or did when it paused last."""
    return tuple(name for name, over in constraint_violations(trial).items() if over > 0)
