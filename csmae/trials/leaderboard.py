"""Which trial is the best: decided here alone, from the trial store, for everything that names or shows one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from csmae.storage.layout import DATABASE
from csmae.trials.attributes import CONFIRMING, CONFIRMS, FINALISTS, NOT_TRAINED
from csmae.trials.database import open_storage, usable
from csmae.trials.pareto import order
from csmae.trials.store import TrialStore
from csmae.trials.trial import front, last_values, ranked, result_of, was_started


@dataclass(frozen=True)
class LeaderboardEntry:
    """A configuration's place."""

    trial: FrozenTrial
    """The trial that found it."""
    scores: tuple[float, ...]
    """First objective: of the trial, then of its repetitions."""
    is_finalist: bool = False
    """Whether it was chosen to be trained again with other seeds."""

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


@dataclass(frozen=True)
class Leaderboard:
    """A study's trials as far as they can win, and why the others cannot."""

    objectives: Mapping[str, str]
    """``maximize`` or ``minimize`` by name, the first one first."""
    entries: list[LeaderboardEntry]
    """Best first."""
    front: frozenset[int] = frozenset()
    """Numbers of those that no other one beats in every objective, by their own scores."""
    repeats: Mapping[int, int] = field(default_factory=dict)
    """Repetitions: by number, the trial that each repeats."""
    broken: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Constraints that a trial breaks, by its number."""

    @property
    def scores(self) -> dict[int, tuple[float, ...]]:
        """First objective of those that can win, over their seeds: by number, best first."""
        return {standing.trial.number: standing.scores for standing in self.entries}


def leaderboard(study: optuna.Study) -> Leaderboard:
    """How the trials of a study stand.

    Trials that keep to the constraints and came to their end stand by their scores, by Pareto front where there are
    several objectives; where none came to its end, those that a budget cut short. Finalists, which are those chosen to
    be trained again with other seeds, stand before all others, by the mean of the first objective over the seeds that each
    has by now: so one that its repetition disproved gives way to one that is not repeated yet. Where the study no longer
    confirms, all compare, with the mean over the seeds that each has in place of its own score.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if _is_trained(t)]
    repetitions = [trial for trial in trials if CONFIRMS in trial.user_attrs]
    explored = [trial for trial in trials if CONFIRMS not in trial.user_attrs]
    signs = [1 if direction is StudyDirection.MAXIMIZE else -1 for direction in study.directions]
    again: dict[int, list[float]] = {}
    for trial in repetitions:
        if (result := result_of(trial)) is not None:
            again.setdefault(trial.user_attrs[CONFIRMS], []).append(result[0])
    named = {*study.user_attrs.get(FINALISTS, ()), *again}
    found = [
        LeaderboardEntry(t, (last_values(t)[0], *again.get(t.number, ())), t.number in named)
        for t in ranked(explored, signs)
    ]
    return Leaderboard(
        dict(zip(study.metric_names or ["objective"], (d.name.lower() for d in study.directions), strict=False)),
        _finalists_first(found, signs) if study.user_attrs.get(CONFIRMING, True) else _by_mean(found, signs),
        frozenset(trial.number for trial in front(explored, signs)),
        {trial.number: trial.user_attrs[CONFIRMS] for trial in repetitions},
        {trial.number: names for trial in trials if (names := violated_constraints(trial))},
    )


def _finalists_first(found: list[LeaderboardEntry], signs: list[int]) -> list[LeaderboardEntry]:
    finalists = [standing for standing in found if standing.is_finalist]
    finalists.sort(key=lambda standing: (-signs[0] * standing.mean, -standing.num_seeds))
    return finalists + [standing for standing in found if not standing.is_finalist]


def _by_mean(found: list[LeaderboardEntry], signs: list[int]) -> list[LeaderboardEntry]:
    values = [(standing.mean, *last_values(standing.trial)[1:]) for standing in found]
    scores = [tuple(sign * value for sign, value in zip(signs, row, strict=True)) for row in values]
    return [found[index] for index in order(scores)]


def stored_leaderboard(folder: Path) -> Leaderboard | None:
    """How the trials of the study in ``folder`` stand; None where there is no trial store beside it, or no such study in it.

    Raises:
        ConfigError: The trial store cannot be used.
    """
    path = folder.absolute().parent / DATABASE
    if not path.exists():
        return None
    with usable(path):
        storage = open_storage(path)
        if folder.absolute().name not in optuna.get_all_study_names(storage):
            return None
        return leaderboard(optuna.load_study(study_name=folder.absolute().name, storage=storage))


def entries(trial_store: TrialStore) -> list[LeaderboardEntry]:
    """The trials of a study that can win, best first."""
    return leaderboard(trial_store.optuna_study).entries


def violated_constraints(trial: FrozenTrial) -> tuple[str, ...]:
    """Constraints that a trial breaks."""
    return tuple(name for name, over in trial.constraints.items() if over > 0)


def _is_trained(trial: FrozenTrial) -> bool:
    return was_started(trial) and NOT_TRAINED not in trial.user_attrs
