"""The study's truth: Optuna's record of every trial, in a database that outlives the search."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from csmae.config import ConfigError
from csmae.settings import flatten
from csmae.tuning.study import Search, Study

DATABASE = "studies.db"

NOT_TRAINED = "not_trained"
"""User attribute of a trial that was settled without training; it does not count as one of the study's trials."""

MOVABLE = ("base.data.path", "base.data.splits_dir")
"""Parts of a definition that may change: the archive may move between two runs of a study."""


class Ledger:
    """One study's trials.

    Args:
        study: Opened under its name, or made.
        folder: Holds ``studies.db``, which many studies share.

    Raises:
        ConfigError: The database cannot be used, or holds a study of this name with another definition.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.path = study, folder / DATABASE
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._optuna = optuna.create_study(
                storage=optuna.storages.RDBStorage(
                    f"sqlite:///{self.path}", engine_kwargs={"connect_args": {"timeout": 30}}
                ),
                study_name=study.name,
                direction=study.search.direction,
                sampler=make_sampler(study.search),
                load_if_exists=True,
            )
            self._define(study)
        except (SQLAlchemyError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"{self.path}: cannot be used as a database of studies: {reason}") from None
        self._left = [trial for trial in self._trials() if trial.state is TrialState.RUNNING]

    def _define(self, study: Study) -> None:
        """Write what a new study is, or compare with what it was started as."""
        now = study.definition()
        written = self._optuna.user_attrs.get("definition")
        if written is not None:
            lines = list(differences(written, now))
            if lines:
                raise ConfigError(
                    f"study {study.name!r} in {self.path} was started otherwise: {'; '.join(lines)}: "
                    "use --name to begin another study"
                )
            return
        self._optuna.set_user_attr("definition", now)
        for point in study.starts():
            self._optuna.enqueue_trial(point, user_attrs={"start": True}, skip_if_exists=True)

    def _trials(self) -> list[FrozenTrial]:
        return self._optuna.get_trials(deepcopy=False)

    def trials(self) -> list[FrozenTrial]:
        """Trials that were or are trained, in order of their numbers."""
        return [t for t in self._trials() if t.state is not TrialState.WAITING and NOT_TRAINED not in t.user_attrs]

    @property
    def num_left(self) -> int:
        """Trials in the middle of which an earlier driver ended, not yet taken up again."""
        return len(self._left)

    def next(self) -> optuna.Trial:
        """A trial that an earlier driver left in the middle, with its number; or a new one."""
        if self._left:
            return optuna.Trial(self._optuna, self._left.pop(0)._trial_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental features, and starting points with parts left open
            return self._optuna.ask()

    def epochs(self, trial: optuna.Trial) -> int:
        """The last epoch whose objective is on record; 0 for none."""
        return max(self._get(trial).intermediate_values, default=0)

    def report(self, trial: optuna.Trial, epoch: int, value: float) -> None:
        """Record an epoch's objective; a value that is not finite leaves no trace."""
        if math.isfinite(value):
            trial.report(value, epoch)

    def complete(self, trial: optuna.Trial, value: float | None) -> str | None:
        """End a trial that was trained to its end.

        Returns:
            None, or why it counts as failed: the objective is missing or not finite.
        """
        if value is None or not math.isfinite(value):
            reason = f"{self.study.search.objective} was {'not reported' if value is None else f'{value} at the end'}"
            self.fail(trial, reason)
            return reason
        self._optuna.tell(trial, value)
        return None

    def prune(self, trial: optuna.Trial) -> None:
        """End a trial that was stopped early; its curve stays."""
        self._optuna.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str, trained: bool = True) -> None:
        """End a trial without a result."""
        trial.set_user_attr("reason", reason)
        if not trained:
            trial.set_user_attr(NOT_TRAINED, True)
        self._optuna.tell(trial, state=TrialState.FAIL)

    def curves(self) -> Iterator[tuple[int, dict[int, float]]]:
        """Each trial's number and its objective by epoch, oldest trial first."""
        for trial in self.trials():
            yield trial.number, dict(sorted(trial.intermediate_values.items()))

    def best(self, count: int = 1) -> list[FrozenTrial]:
        """The best trials among those trained to their end, best first."""
        done = [t for t in self.trials() if t.state is TrialState.COMPLETE]
        return sorted(done, key=lambda t: -self.sign * (t.value or 0.0))[:count]

    @property
    def sign(self) -> int:
        """1 where a larger objective is better, else -1."""
        return 1 if self.study.search.direction == "maximize" else -1

    def _get(self, trial: optuna.Trial) -> FrozenTrial:
        return self._optuna._storage.get_trial(trial._trial_id)


def make_sampler(search: Search) -> optuna.samplers.BaseSampler:
    """The sampler that a study asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        seed, startup = search.seed, search.startup_trials
        if search.sampler == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
            )
        if search.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if search.sampler == "qmc":
            return optuna.samplers.QMCSampler(seed=seed, scramble=True)
        if search.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What changed between two definitions, one text a name."""
    old, new = dict(flatten(before)), dict(flatten(json.loads(json.dumps(now))))
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name) and name not in MOVABLE:
            yield f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"
