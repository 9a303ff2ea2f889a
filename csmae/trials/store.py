"""The trial store: every trial of a study in Optuna's database, which outlives the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from csmae.config import ConfigError
from csmae.storage.layout import CHECKPOINT, DATABASE, trial_dir
from csmae.storage.manifest import RemoteStorage
from csmae.storage.object_store import describe_error, retry
from csmae.study.study import Study
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import (
    ASSIGNMENTS,
    CHAMPION,
    CONFIRMS,
    EPOCH_VALUES,
    FINALISTS,
    INTERRUPTED,
    LAST_METRICS,
    LINEAGE,
    NOT_TRAINED,
    NUM_EPOCHS,
    PROVENANCE,
    REASON,
    RESULT,
    SCORES,
    SEED,
    SOURCES,
    STARTING_POINT,
    STOPPED,
    VIOLATIONS,
)
from csmae.trials.database import report_database_errors
from csmae.trials.optuna_private import (
    continue_trial,
    frozen_trial,
    put_on_hold,
    set_attribute,
    single_writer,
    start_trial,
)
from csmae.trials.redefinition import open_study
from csmae.trials.trial import (
    Values,
    assignment,
    assignments,
    confirmed_number,
    curve,
    is_cut_short,
    is_dropped,
    num_epochs,
    params_of,
    parent_number,
    status_of,
)


class TrialStore:
    """One study's trials. Lives in the driver, which is the only writer.

    Args:
        study: Opened under its name, or created.
        storage: Folder of ``studies.db``, which many studies share, and of each study's own folder.
        remote: The object store with the trials' files; None if they are in that folder.
        backend: Optuna's storage in place of the database; simulated searches keep it in memory.

    Raises:
        ConfigError: The database cannot be used, or holds a study of this name with another definition.
    """

    def __init__(
        self, study: Study, storage: Path, remote: RemoteStorage | None = None, backend: BaseStorage | None = None
    ) -> None:
        self.study, self.path, self.remote = study, storage.absolute() / DATABASE, remote
        with report_database_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            opened, self.shorter_epochs = open_study(study, self.path, self._has_checkpoint, backend)
            self.optuna_study = single_writer(opened)
            self._enqueue_starting_points()
            self._reject_enqueued_confirmations()
            self._interrupted = [
                trial for trial in self.all_trials() if status_of(trial) in (TrialStatus.RUNNING, TrialStatus.WAITING)
            ]

    def _has_checkpoint(self, number: int) -> bool:
        run_dir, remote = self.run_dir(number), self.remote
        if remote is None:
            return (run_dir / CHECKPOINT).exists()
        try:
            return bool(retry(lambda: remote.remote_folder(run_dir).manifest().files))
        except OSError as error:
            raise ConfigError(
                f"--storage {remote.store.url}: {describe_error(error)}: run again when it does"
            ) from None

    def _enqueue_starting_points(self) -> None:
        """Enqueue the starting points, each once: a resumed study may name further ones."""
        known = [trial.user_attrs[STARTING_POINT] for trial in self.all_trials() if STARTING_POINT in trial.user_attrs]
        for point in self.study.starting_points():
            if point not in known:
                known.append(point)
                self.enqueue(point, **{STARTING_POINT: point})

    def _reject_enqueued_confirmations(self) -> None:
        """Reject confirmations that a killed driver enqueued: the best trials may be others by now."""
        for trial in self._enqueued():
            if confirmed_number(trial) is not None:
                self.reject(start_trial(self.optuna_study, trial), "not started")

    # Where the files are.

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.path.parent / self.study.name

    def run_dir(self, number: int) -> Path:
        """A trial's folder."""
        return trial_dir(self.folder, number)

    def encoder_dir(self, number: int) -> Path:
        """The folder of a trial's encoder, if it saved one."""
        return self.run_dir(number) / "encoder"

    # Reading.

    def all_trials(self) -> list[FrozenTrial]:
        """All trials in the database, in the order of their numbers."""
        return self.optuna_study.get_trials(deepcopy=False)

    def trials(self) -> list[FrozenTrial]:
        """Trials that this study trained or trains, in the order of their numbers."""
        found = ((trial, status_of(trial)) for trial in self.all_trials())
        return [trial for trial, status in found if status.is_trained and status is not TrialStatus.WAITING]

    def explored(self) -> list[FrozenTrial]:
        """Trials that count toward ``search.num_trials``: ``trials()`` without confirmations and copies of other trials."""
        return [trial for trial in self.trials() if confirmed_number(trial) is None and parent_number(trial) is None]

    def curves(self) -> Iterator[tuple[int, dict[int, Values]]]:
        """Each trial's number and its objectives by epoch, oldest trial first, without confirmations."""
        for trial in self.all_trials():
            if confirmed_number(trial) is None:
                yield trial.number, curve(trial)

    def last_metrics(self, trial: optuna.Trial) -> Mapping[str, float]:
        """The metrics that ``record_last_metrics`` wrote last; empty if it wrote none."""
        found: Mapping[str, float] = frozen_trial(trial).user_attrs.get(LAST_METRICS, {})
        return found

    def has_result(self, trial: optuna.Trial) -> bool:
        """Whether a trial that is cut short now has a result: it has a score, and a confirmation needs all its epochs."""
        return confirmed_number(trial) is None and bool(curve(frozen_trial(trial)))

    def confirmations(self, number: int) -> list[FrozenTrial]:
        """Confirmations of a trial that run or ended, without those that a budget cut short."""
        return [trial for trial in self.trials() if confirmed_number(trial) == number and not is_cut_short(trial)]

    # Starting trials.

    def enqueue(self, point: Mapping[str, Any], **attributes: Any) -> None:
        """Enqueue a point: it is tried before the sampler proposes further ones."""
        self.optuna_study.enqueue_trial(self.study.space.encode(point), user_attrs=attributes)

    def _enqueued(self) -> list[FrozenTrial]:
        waiting = self.optuna_study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return [trial for trial in waiting if status_of(trial) is TrialStatus.ENQUEUED]

    def next_enqueued(self, is_wanted: Callable[[FrozenTrial], bool]) -> FrozenTrial | None:
        """The first enqueued trial that is wanted."""
        return next(filter(is_wanted, self._enqueued()), None)

    def start_enqueued(self, trial: FrozenTrial, assignment: Mapping[str, Any] | None) -> optuna.Trial:
        """Start an enqueued trial with its first piece of training; None trains it to its end."""
        if assignment:
            set_attribute(self.optuna_study, trial, ASSIGNMENTS, [dict(assignment)])
        return start_trial(self.optuna_study, trial)

    def ask(self) -> optuna.Trial:
        """Start the first enqueued trial, or a new one whose parameters the sampler proposes."""
        return self.optuna_study.ask()

    def start_confirmation(self, trial: FrozenTrial, seed: int) -> optuna.Trial:
        """Start a trial at another one's point with another seed."""
        lineage = {LINEAGE: trial.user_attrs[LINEAGE]} if LINEAGE in trial.user_attrs else {}
        self.enqueue(params_of(trial), **{CONFIRMS: trial.number, SEED: seed, **lineage})
        return start_trial(self.optuna_study, self._enqueued()[-1])  # the first may be a starting point

    @property
    def num_interrupted(self) -> int:
        """Trials that were interrupted, by the end of a run, a budget or a lost worker group, and have not been resumed."""
        return len(self._interrupted)

    def next_interrupted(self) -> optuna.Trial:
        """Resume the first interrupted trial."""
        return start_trial(self.optuna_study, self._interrupted.pop(0))

    def paused_trial(self, number: int) -> optuna.Trial:
        """The live form of a paused trial, which ``assign`` resumes."""
        found = self.all_trials()[number]
        assert status_of(found) is TrialStatus.PAUSED, f"trial {number} is {status_of(found)}"
        return continue_trial(self.optuna_study, found)

    def requeue(self, trial: optuna.Trial) -> None:
        """Have a running trial resumed later in this run."""
        self._interrupted.append(frozen_trial(trial))

    # Recording.

    def assign(self, trial: optuna.Trial, until: int, reason: str) -> None:
        """Record the next piece of a trial's training, which resumes a paused trial.

        Args:
            trial: Is running or paused.
            until: Epoch after which it pauses, or ends if its training is complete.
            reason: Why it is proposed or resumed, for people.
        """
        frozen = frozen_trial(trial)
        resumes = assignments(frozen) and not is_dropped(frozen)
        start = min(num_epochs(frozen), until - 1) if resumes else 0  # one may lack only its end
        piece = assignment(start, until, reason)
        trial.set_user_attr(ASSIGNMENTS, [*assignments(frozen), piece])

    def pause(self, trial: optuna.Trial, epoch: int, violations: Mapping[str, float]) -> None:
        """Record that a running trial has paused after an epoch, with its checkpoint saved.

        Args:
            trial: Has an assignment.
            epoch: Its last one.
            violations: By how much its last metrics violate each constraint; 0 where they do not.
        """
        *before, last = assignments(frozen_trial(trial)) or [assignment(0, epoch, "complete training")]
        if violations:
            trial.set_user_attr(VIOLATIONS, dict(violations))
        trial.set_user_attr(ASSIGNMENTS, [*before, {**last, "paused": epoch}])

    def record_dropped(self, number: int) -> None:
        """Record that a paused trial's checkpoint was removed: it restarts from scratch if it resumes."""
        *before, last = assignments(self.all_trials()[number])
        self.paused_trial(number).set_user_attr(ASSIGNMENTS, [*before, {**last, "dropped": True}])

    def record_epoch(self, trial: optuna.Trial, epoch: int, values: Values) -> None:
        """Record an epoch's objectives; if one is not finite, or there are none, only that it was trained."""
        if not values or not all(map(math.isfinite, values)):
            self.record_num_epochs(trial, epoch)
        elif len(values) == 1:
            trial.report(values[0], epoch)
        else:
            trial.set_user_attr(f"{EPOCH_VALUES}{epoch}", values)

    def record_last_metrics(self, trial: optuna.Trial, metrics: Mapping[str, float]) -> None:
        """Record the metrics that decide on a trial when it ends. A study without constraints needs none."""
        search = self.study.search
        if search.constraints:
            names = [name for name in (*search.objectives, *search.constraints) if name in metrics]
            trial.set_user_attr(LAST_METRICS, {name: metrics[name] for name in names})

    def record_finalists(self, trials: Iterable[FrozenTrial]) -> None:
        """Record trials that are chosen for confirmation; earlier finalists stay."""
        before = self.optuna_study.user_attrs.get(FINALISTS, [])
        if new := [trial.number for trial in trials if trial.number not in before]:
            self.optuna_study.set_user_attr(FINALISTS, [*before, *new])

    def record_champion(self, number: int, mean: float, num_seeds: int) -> None:
        """Record the search's champion, for readers of Optuna's study."""
        self.optuna_study.set_user_attr(CHAMPION, {"trial": number, "mean": mean, "seeds": num_seeds})

    def record_provenance(self, tags: Mapping[str, str]) -> None:
        """Record how the search was started, see ``csmae.tracking.provenance``."""
        with report_database_errors(self.path):
            self.optuna_study.set_user_attr(PROVENANCE, dict(tags))

    def record_scores(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Record scores by the published protocol, by name of the encoder and the metric."""
        self.optuna_study.set_user_attr(SCORES, {name: dict(metrics) for name, metrics in scores.items()})

    def record_num_epochs(self, trial: optuna.Trial, epoch: int) -> None:
        """Record the last epoch of a trial, unless its scores show it."""
        if epoch > num_epochs(frozen_trial(trial)):
            trial.set_user_attr(NUM_EPOCHS, epoch)

    # Ending trials.

    def complete(self, trial: optuna.Trial, values: Values) -> None:
        """End a trial that was trained to its last epoch."""
        if confirmed_number(trial) is not None:
            trial.set_user_attr(RESULT, values)
            self.prune(trial)
        else:
            self.optuna_study.tell(trial, values)

    def prune(self, trial: optuna.Trial) -> None:
        """End a trial that has no result of its own, such as one that was stopped early; its curve is kept."""
        self.optuna_study.tell(trial, state=TrialState.PRUNED)

    def stop(self, trial: optuna.Trial, reason: str) -> None:
        """End a running or paused trial that the strategy stops for good."""
        trial.set_user_attr(STOPPED, reason)
        self.prune(trial)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """End a trial without a result."""
        trial.set_user_attr(REASON, reason)
        self.optuna_study.tell(trial, state=TrialState.FAIL)

    def reject(self, trial: optuna.Trial, reason: str, violations: Mapping[str, float] | None = None) -> None:
        """End a trial without training it.

        Args:
            trial: Has not been trained.
            reason: Why.
            violations: By how much it violates constraints; the sampler learns from these to avoid such points.
        """
        for name, over in (violations or {}).items():
            trial.set_constraint(name, over)
        trial.set_user_attr(REASON, reason)
        trial.set_user_attr(NOT_TRAINED, True)
        self.optuna_study.tell(trial, state=TrialState.PRUNED if violations else TrialState.FAIL)

    def cut_short(self, trial: optuna.Trial, reason: str) -> None:
        """End a trial at a budget's limit. A trial without a result waits, and resumes from its checkpoint."""
        if self.has_result(trial):
            trial.set_user_attr(REASON, reason)
            self.prune(trial)
        else:
            trial.set_user_attr(INTERRUPTED, reason)
            put_on_hold(trial)

    # Studies to transfer trials from.

    @property
    def sources(self) -> list[str]:
        """Studies whose trials must be transferred again, because the study's definition changed."""
        return list(self.optuna_study.user_attrs.get(SOURCES, []))

    def drop_source(self, name: str) -> None:
        """Record that a study's trials were transferred, or that none can be."""
        if name in self.sources:
            self.optuna_study.set_user_attr(SOURCES, [source for source in self.sources if source != name])
