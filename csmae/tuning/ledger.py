"""The study's truth: Optuna's record of every trial, in a database that outlives the search."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from csmae.config import ConfigError
from csmae.settings import flatten
from csmae.tuning.ranking import fronts, order
from csmae.tuning.samplers import make_sampler
from csmae.tuning.study import Study

DATABASE = "studies.db"

NOT_TRAINED = "not_trained"
"""User attribute of a trial that was settled without training; it does not count as one of the study's trials."""

CONFIRMS = "confirms"
"""User attribute of a trial that repeats another one, whose number it holds, with another seed."""

MOVABLE = ("base.data.path", "base.data.splits_dir")
"""Parts of a definition that may change: the archive may move between two runs of a study."""

Values = tuple[float, ...]


class Ledger:
    """One study's trials.

    Args:
        study: Opened under its name, or made.
        storage: Folder of ``studies.db``, which many studies share, and of their own folders.

    Raises:
        ConfigError: The database cannot be used, or holds a study of this name with another definition.
    """

    def __init__(self, study: Study, storage: Path) -> None:
        self.study, self.path = study, storage.absolute() / DATABASE
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.optuna = self._open()
            self._define(study)
            self._left = [trial for trial in self.all_trials() if trial.state is TrialState.RUNNING]
        except (SQLAlchemyError, RuntimeError, OSError) as error:
            raise ConfigError(unusable(self.path, error)) from None

    def _open(self) -> optuna.Study:
        study = self.study
        try:
            return optuna.create_study(
                storage=open_storage(self.path),
                study_name=study.name,
                directions=list(study.search.objectives.values()),
                load_if_exists=True,
            )
        except ValueError:  # what Optuna says of other directions
            raise ConfigError(
                f"study {study.name!r} in {self.path} was started with other objectives: use --fork NEW"
            ) from None

    def _define(self, study: Study) -> None:
        """Write what a new study is, or compare with what it was started as."""
        now = study.definition()
        written = self.optuna.user_attrs.get("definition")
        if written is None:
            self.optuna.set_user_attr("definition", now)
            self.optuna.set_user_attr("said", dict(study.base))
            self.optuna.set_metric_names(list(study.search.objectives))
            for point in study.starts():
                self.enqueue(point, start=True)
            if study.search.sampler == "grid":
                points = list(study.space.grid())
                random.Random(study.search.seed).shuffle(points)
                for point in points:
                    self.enqueue(point)
            return
        lines = list(differences(written, now))
        if lines:
            raise ConfigError(
                f"study {study.name!r} in {self.path} was started otherwise: {'; '.join(lines)}: "
                "use --fork NEW to begin a study that takes over what still fits"
            )

    # What there is.

    @property
    def folder(self) -> Path:
        """Of the study."""
        return self.path.parent / self.study.name

    def run_dir(self, number: int) -> Path:
        """Of a trial."""
        return self.folder / "trials" / str(number)

    def all_trials(self) -> list[FrozenTrial]:
        """Everything that Optuna knows, in order of the numbers."""
        return self.optuna.get_trials(deepcopy=False)

    def trials(self) -> list[FrozenTrial]:
        """Trials that were or are trained by this study, in order of their numbers."""
        return [t for t in self.all_trials() if t.state is not TrialState.WAITING and NOT_TRAINED not in t.user_attrs]

    def explored(self) -> list[FrozenTrial]:
        """Trials that count as the study's: those trained, without the repetitions that confirm."""
        return [trial for trial in self.trials() if CONFIRMS not in trial.user_attrs]

    @property
    def num_left(self) -> int:
        """Trials in the middle of which an earlier driver ended, not yet taken up again."""
        return len(self._left)

    @property
    def num_waiting(self) -> int:
        """Points put in line and not yet proposed."""
        return sum(trial.state is TrialState.WAITING for trial in self.all_trials())

    def curves(self) -> Iterator[tuple[int, dict[int, Values]]]:
        """Each trial's number and its objectives by epoch, oldest trial first; repetitions left aside.

        A trial that goes on tells its last epoch again, and may not have been judged by it: that one is left out.
        """
        for trial in self.all_trials():
            epochs = sorted(trial.intermediate_values)
            if trial.state is TrialState.RUNNING:
                epochs = epochs[:-1]
            if epochs and CONFIRMS not in trial.user_attrs:
                yield trial.number, {epoch: _values(trial, epoch) for epoch in epochs}

    def ranked(self) -> list[FrozenTrial]:
        """Trials trained to their end that keep to the constraints, best first; by Pareto front for several objectives.

        Where none came to its end, those that the budget cut short.
        """
        trials = self._eligible()
        return [trials[index] for index in order([self._scores(trial) for trial in trials])]

    def front(self) -> list[FrozenTrial]:
        """Those of the ranked trials that no other one beats in every objective."""
        trials = self._eligible()
        ranks = fronts([self._scores(trial) for trial in trials])
        return [trial for trial, rank in zip(trials, ranks, strict=True) if rank == 0]

    def _eligible(self) -> list[FrozenTrial]:
        trials = [
            trial
            for trial in self.explored()
            if trial.intermediate_values
            and trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            and max(trial.constraints.values(), default=0) <= 0
        ]
        return [trial for trial in trials if trial.state is TrialState.COMPLETE] or trials

    def _scores(self, trial: FrozenTrial) -> Values:
        return tuple(sign * value for sign, value in zip(self.study.search.signs, last_values(trial), strict=True))

    # What happens.

    def enqueue(self, point: Mapping[str, Any], **attributes: Any) -> None:
        """Put a point in line: it is proposed before any of the sampler's own."""
        self.optuna.enqueue_trial(dict(point), user_attrs=attributes)

    def next(self) -> optuna.Trial:
        """A trial that an earlier driver left in the middle, with its number; or a new one."""
        if self._left:
            left = self._left.pop(0)
            self.optuna.sampler = make_sampler(self.study.search, left.number)
            return optuna.Trial(self.optuna, left._trial_id)
        self.optuna.sampler = make_sampler(self.study.search, len(self.all_trials()))
        return self.optuna.ask()

    def record(self, trial: optuna.Trial, epoch: int, values: Values) -> None:
        """Write down an epoch's objectives; values that are not finite leave no trace."""
        if not all(map(math.isfinite, values)):
            return
        if len(values) > 1:
            trial.set_user_attr(f"epoch {epoch}", values)  # Optuna's curves hold one value
        self.optuna._storage.set_trial_intermediate_value(trial._trial_id, epoch, values[0])

    def complete(self, trial: optuna.Trial, values: Values) -> None:
        """End a trial that was trained to its end."""
        self.optuna.tell(trial, values)

    def prune(self, trial: optuna.Trial) -> None:
        """End a trial that was stopped early; its curve stays."""
        self.optuna.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """End a trial without a result."""
        trial.set_user_attr("reason", reason)
        self.optuna.tell(trial, state=TrialState.FAIL)

    def refuse(self, trial: optuna.Trial, reason: str, steer: bool) -> None:
        """Settle a trial without training it.

        Args:
            trial: Its constraints are set where it breaks any.
            reason: Why.
            steer: Whether the sampler shall learn to keep away.
        """
        trial.set_user_attr("reason", reason)
        trial.set_user_attr(NOT_TRAINED, True)
        self.optuna.tell(trial, state=TrialState.PRUNED if steer else TrialState.FAIL)

    def frozen(self, trial: optuna.Trial) -> FrozenTrial:
        """What is on record of a trial."""
        return self.optuna._storage.get_trial(trial._trial_id)


def open_storage(path: Path) -> optuna.storages.RDBStorage:
    """The database of studies in a file; SQLite waits for half a minute where another process writes."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 30}})


def unusable(path: Path, error: Exception) -> str:
    """What to say of a database that is locked, of another Optuna, damaged, or on a full disk."""
    reason = " ".join(str(error.__cause__ or error).partition("[SQL")[0].split())[:160]
    if "disk is full" in reason or "No space left" in reason:
        return f"{path}: the disk is full: make room"
    if "locked" in reason:
        return f"{path}: another process holds the database of studies: try again when it is done"
    if "no longer compatible" in reason:
        return (
            f"{path}: was written by another version of Optuna than {optuna.__version__}, which is installed: "
            "install that version, or use another --storage"
        )
    return f"{path}: cannot be used as a database of studies: {reason}: restore it, or use another --storage"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What changed between two definitions, one text a name."""
    old, new = dict(flatten(before)), dict(flatten(json.loads(json.dumps(now))))
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name) and name not in MOVABLE:
            yield f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"


def last_values(trial: FrozenTrial) -> Values:
    """A trial's objectives after its last epoch."""
    return tuple(trial.values or _values(trial, max(trial.intermediate_values)))


def _values(trial: FrozenTrial, epoch: int) -> Values:
    return tuple(trial.user_attrs.get(f"epoch {epoch}", (trial.intermediate_values[epoch],)))
