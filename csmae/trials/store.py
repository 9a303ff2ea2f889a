"""The study's truth: Optuna's record of every trial, in a database that outlives the search."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.config import ConfigError
from csmae.storage.layout import DATABASE
from csmae.storage.manifest import Files
from csmae.storage.object_store import reason, retry
from csmae.study.study import Study
from csmae.study.values import Value
from csmae.trials.attributes import (
    CHAMPION,
    CONFIRMING,
    CONFIRMS,
    CUT,
    EPOCH,
    FINALISTS,
    MEASURED,
    NOT_TRAINED,
    ORIGIN,
    RESULT,
    SOURCES,
    SPENT,
    START,
)
from csmae.trials.database import open_storage, usable
from csmae.trials.redefinition import PreservedState, differences
from csmae.trials.trial import Values, curve, front, ranked, waits, was_cut_short, was_started


class TrialStore:
    """One study's trials.

    Args:
        study: Opened under its name, or made.
        storage: Folder of ``studies.db``, which many studies share, and of their own folders.
        files: Where the trials' files are, if not in that folder.

    Raises:
        ConfigError: The database cannot be used, or holds a study of this name with another definition.
    """

    def __init__(self, study: Study, storage: Path, files: Files | None = None) -> None:
        self.study, self.path, self.files = study, storage.absolute() / DATABASE, files
        with usable(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            database = open_storage(self.path)
            self.optuna_study = self._open(database)
            self._define(database)
            self._enqueue_starting_points()
            self._settle_repetitions()
            self._left = [trial for trial in self.all_trials() if trial.state is TrialState.RUNNING or waits(trial)]

    def _open(self, storage: optuna.storages.BaseStorage) -> optuna.Study:
        directions = list(self.study.search.objectives.values())
        return optuna.create_study(
            storage=storage, study_name=self.study.name, directions=directions, load_if_exists=True
        )

    def _define(self, storage: optuna.storages.BaseStorage) -> None:
        """Write what a study is, where it is new or nothing of it was trained; else compare with what it was started as."""
        study, written = self.study, self.optuna_study.user_attrs.get("definition")
        kept = PreservedState.read(self._kept_path)  # of a driver that was killed meanwhile
        if written is None and kept is None and self.all_trials():
            raise ConfigError(f"study {study.name!r} in {self.path} was not created by this program: use --name")
        lines = list(differences(written, study.definition())) if written and kept is None else []
        if lines and any(map(self._was_trained, self.all_trials())):
            raise ConfigError(
                f"study {study.name!r} in {self.path} was started with a different definition: {'; '.join(lines)}: "
                "use --fork NEW to begin a study that takes over what still fits"
            )
        if lines:
            kept = self._kept()
            kept.write(self._kept_path)
        if kept:
            self._make_anew(storage, kept)
        self._write_definition()

    def _write_definition(self) -> None:
        study = self.study
        if list(self.optuna_study.metric_names or []) != list(study.search.objectives):
            self.optuna_study.set_metric_names(list(study.search.objectives))
        confirms = study.search.confirm is not None
        for name, value in (("said", dict(study.base)), ("definition", study.definition()), (CONFIRMING, confirms)):
            if self.optuna_study.user_attrs.get(name) != json.loads(json.dumps(value)):
                self.optuna_study.set_user_attr(name, value)

    def _was_trained(self, trial: FrozenTrial) -> bool:
        """Whether a trial has a score, or a checkpoint from which it goes on."""
        if NOT_TRAINED in trial.user_attrs:
            return False
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or curve(trial):
            return True
        goes_on = trial.state is TrialState.RUNNING or waits(trial)
        return goes_on and self._has_files(self.run_dir(trial.number))

    def _has_files(self, run_dir: Path) -> bool:
        """Whether a trial has a checkpoint, in the folder or in the bucket."""
        files = self.files
        if files is None:
            return (run_dir / "checkpoint.pt").exists()
        try:
            return bool(retry(lambda: files.of(run_dir).manifest().files))
        except OSError as error:
            raise ConfigError(f"--storage {files.bucket.url}: {reason(error)}: run again when it does") from None

    @property
    def _kept_path(self) -> Path:
        return self.folder / "redefinition.json"

    def _kept(self) -> PreservedState:
        """What stays: what the study took so far, and the numbers of trials that were begun in vain, for trackers know these."""
        old, attributes = self.all_trials(), self.optuna_study.user_attrs
        sources = {trial.user_attrs[ORIGIN][0] for trial in old if ORIGIN in trial.user_attrs} | {*self.sources}
        num_used = max((trial.number + 1 for trial in old if _uses_number(trial)), default=0)
        spent = {key: attributes[key] for key in SPENT & attributes.keys()}
        return PreservedState(spent | {SOURCES: sorted(sources)}, [_placeholder(trial) for trial in old[:num_used]])

    def _make_anew(self, storage: optuna.storages.BaseStorage, kept: PreservedState) -> None:
        """Make Optuna's study once more, for it never changes its directions or the choices of a parameter."""
        optuna.delete_study(study_name=self.study.name, storage=storage)
        self.optuna_study = self._open(storage)
        self._write_definition()
        for key, value in kept.attributes.items():
            self.optuna_study.set_user_attr(key, value)
        for attributes in kept.trials:
            self.optuna_study.add_trial(optuna.create_trial(state=TrialState.FAIL, user_attrs=attributes))
        shutil.rmtree(self.run_dir(0).parent, ignore_errors=True)
        self._kept_path.unlink()

    @property
    def sources(self) -> list[str]:
        """Studies from which trials have yet to be taken over again, for this one got another definition since."""
        return list(self.optuna_study.user_attrs.get(SOURCES, []))

    def drop_source(self, name: str) -> None:
        """Note that what fits was taken over from a study, or that nothing can be."""
        if name in self.sources:
            self.optuna_study.set_user_attr(SOURCES, [source for source in self.sources if source != name])

    def _enqueue_starting_points(self) -> None:
        """Put the starting points in line, once each: a study that goes on may name further ones."""
        there = [trial.user_attrs[START] for trial in self.all_trials() if START in trial.user_attrs]
        for point in self.study.starts():
            if point not in there:
                there.append(point)
                self.enqueue(point, start=point)

    def _settle_repetitions(self) -> None:
        """Take repetitions out of line that a killed driver put there: the best may be others by now."""
        for trial in self._queued():
            if CONFIRMS in trial.user_attrs and not waits(trial):
                self.reject(self._begin(trial), "not begun", steer=False)

    # What there is.

    @property
    def folder(self) -> Path:
        """Of the study."""
        return self.path.parent / self.study.name

    def run_dir(self, number: int) -> Path:
        """Of a trial."""
        return self.folder / "trials" / str(number)

    def encoder_dir(self, number: int) -> Path:
        """Of a trial, where it has left its encoder."""
        return self.run_dir(number) / "encoder"

    def all_trials(self) -> list[FrozenTrial]:
        """Everything that Optuna knows, in order of the numbers."""
        return self.optuna_study.get_trials(deepcopy=False)

    def trials(self) -> list[FrozenTrial]:
        """Trials that were or are trained by this study, in order of their numbers."""
        return [t for t in self.all_trials() if t.state is not TrialState.WAITING and NOT_TRAINED not in t.user_attrs]

    def explored(self) -> list[FrozenTrial]:
        """Trials that count as the study's: those trained, without the repetitions that confirm."""
        return [trial for trial in self.trials() if CONFIRMS not in trial.user_attrs]

    @property
    def num_interrupted(self) -> int:
        """Trials that were left in the middle, by an earlier driver, its budget or a lost slot, and not yet taken up again."""
        return len(self._left)

    @property
    def has_queued(self) -> bool:
        """Whether points are put in line and not yet proposed."""
        return bool(self._queued())

    def _queued(self) -> list[FrozenTrial]:
        return self.optuna_study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def curves(self) -> Iterator[tuple[int, dict[int, Values]]]:
        """Each trial's number and its objectives by epoch, oldest trial first; repetitions left aside."""
        for trial in self.all_trials():
            if CONFIRMS not in trial.user_attrs:
                yield trial.number, curve(trial)

    def ranked(self) -> list[FrozenTrial]:
        """Trials trained to their end that keep to the constraints, best first; by Pareto front for several objectives.

        Where none came to its end, those that the budget cut short.
        """
        return ranked(self.explored(), self.study.search.signs)

    def front(self) -> list[FrozenTrial]:
        """Those of the ranked trials that no other one beats in every objective."""
        return front(self.explored(), self.study.search.signs)

    def record_finalists(self, top: int) -> list[FrozenTrial]:
        """The best trials by now, on record as those that are trained again; those named before stay so."""
        best = self.ranked()[:top]
        before = self.optuna_study.user_attrs.get(FINALISTS, [])
        if new := [trial.number for trial in best if trial.number not in before]:
            self.optuna_study.set_user_attr(FINALISTS, [*before, *new])
        return best

    def record_champion(self, number: int, mean: float, num_seeds: int) -> None:
        """Put on record whom the search names, for those who look at Optuna's study."""
        self.optuna_study.set_user_attr(CHAMPION, {"trial": number, "mean": mean, "seeds": num_seeds})

    def num_repetitions(self, number: int) -> int:
        """Repetitions of a trial that run or are over; one that a budget cut short has to be made up for."""
        again = (trial for trial in self.trials() if trial.user_attrs.get(CONFIRMS) == number)
        return sum(not was_cut_short(trial) for trial in again)

    # What happens.

    def enqueue(self, point: Mapping[str, Any], **attributes: Any) -> None:
        """Put a point in line: it is proposed before any of the sampler's own."""
        self.optuna_study.enqueue_trial(self.study.space.encode(point), user_attrs=attributes)

    def next_interrupted(self) -> optuna.Trial:
        """The first trial that was left in the middle."""
        return self._begin(self._left.pop(0))

    def requeue(self, trial: optuna.Trial) -> None:
        """Leave a trial in the middle, to be taken up again by this driver."""
        self._left.append(self.frozen(trial))

    def next(self) -> optuna.Trial:
        """A new trial: the first in line; where nobody is, one whose values the sampler draws."""
        return self.optuna_study.ask()

    def repeat(self, trial: FrozenTrial, seed: int) -> optuna.Trial:
        """A new trial at another one's point, with another seed."""
        self.enqueue(self.values(trial), start=True, confirms=trial.number, seed=seed)
        return self._begin(self._queued()[-1])  # the first in line may be a starting point that was never come to

    def _begin(self, waiting: FrozenTrial) -> optuna.Trial:
        self.optuna_study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
        return optuna.Trial(self.optuna_study, waiting._trial_id)

    def record_epoch(self, trial: optuna.Trial, epoch: int, values: Values) -> None:
        """Write down an epoch's objectives; values that are not finite leave no trace."""
        if not all(map(math.isfinite, values)):
            return
        if len(values) == 1:
            trial.report(values[0], epoch)
        else:
            trial.set_user_attr(f"{EPOCH}{epoch}", values)

    def record_measured(self, trial: optuna.Trial, metrics: Mapping[str, float]) -> None:
        """Write down the metrics by which a trial is judged when it ends; nothing in a study without constraints."""
        search = self.study.search
        if search.constraints:
            wanted = [name for name in (*search.objectives, *search.constraints) if name in metrics]
            trial.set_user_attr(MEASURED, {name: metrics[name] for name in wanted})

    def measured(self, trial: optuna.Trial) -> Mapping[str, float]:
        """What ``record_measured`` wrote last; empty if it wrote nothing."""
        found: Mapping[str, float] = self.frozen(trial).user_attrs.get(MEASURED, {})
        return found

    def complete(self, trial: optuna.Trial, values: Values) -> None:
        """End a trial that was trained to its end."""
        if CONFIRMS in trial.user_attrs:
            trial.set_user_attr(RESULT, values)
            self.prune(trial)
        else:
            self.optuna_study.tell(trial, values)

    def prune(self, trial: optuna.Trial) -> None:
        """End a trial that was stopped early; its curve stays."""
        self.optuna_study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """End a trial without a result."""
        trial.set_user_attr("reason", reason)
        self.optuna_study.tell(trial, state=TrialState.FAIL)

    def reject(self, trial: optuna.Trial, reason: str, steer: bool) -> None:
        """Settle a trial without training it.

        Args:
            trial: Its constraints are set where it breaks any.
            reason: Why.
            steer: Whether the sampler shall learn to keep away.
        """
        trial.set_user_attr("reason", reason)
        trial.set_user_attr(NOT_TRAINED, True)
        self.optuna_study.tell(trial, state=TrialState.PRUNED if steer else TrialState.FAIL)

    def has_result(self, trial: optuna.Trial) -> bool:
        """Whether a trial counts if it is cut short now: it has a score, and is no repetition, of which only the end counts."""
        return CONFIRMS not in trial.user_attrs and bool(curve(self.frozen(trial)))

    def cut_short(self, trial: optuna.Trial, reason: str) -> None:
        """End a trial that the budget cut short; one without a result waits, to resume from its checkpoint."""
        if self.has_result(trial):
            trial.set_user_attr("reason", reason)
            self.prune(trial)
        else:
            trial.set_user_attr(CUT, reason)
            self.optuna_study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def values(self, trial: FrozenTrial) -> dict[str, Value]:
        """A trial's point of the space."""
        return self.study.space.decode(trial.params)

    def frozen(self, trial: optuna.Trial) -> FrozenTrial:
        """What is on record of a trial."""
        return self.optuna_study._storage.get_trial(trial._trial_id)


def _uses_number(trial: FrozenTrial) -> bool:
    """Whether a trial was begun or refused by this study itself, so that no other one may have its number."""
    return ORIGIN not in trial.user_attrs and was_started(trial)


def _placeholder(trial: FrozenTrial) -> dict[str, Any]:
    """User attributes of a trial that stands for one of a former definition: why it has no result, and what it took."""
    reason = trial.user_attrs.get("reason", "the study's file was changed before anything was trained")
    return {NOT_TRAINED: True, "reason": reason, **{k: v for k, v in trial.user_attrs.items() if k in SPENT}}
