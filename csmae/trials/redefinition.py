"""Opening a study in the database, and what happens if its definition has changed since it was started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.atomic import atomic_write
from csmae.config import ConfigError, MayChange, changeable, with_defaults
from csmae.settings import flatten
from csmae.study.options import Search
from csmae.study.study import Study
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import (
    BASE,
    CONFIRMING,
    DEFINITION,
    ELAPSED_S,
    FORMAT,
    GPU_S,
    NOT_TRAINED,
    PROJECTED_FROM,
    REASON,
    SOURCES,
    STUDY_FORMAT,
    TRANSFERRED_FROM,
    WORKER_S,
)
from csmae.trials.database import check_format, open_storage
from csmae.trials.growth import describe_shrinking, lengthen, shorter_epochs
from csmae.trials.trial import curve, status_of


def open_study(
    study: Study,
    database: Path,
    has_checkpoint: Callable[[int], bool],
    backend: optuna.storages.BaseStorage | None = None,
) -> tuple[optuna.Study, int | None]:
    """Open a study in the database, or create it.

    As long as none of its trials was trained, a study accepts every change of its definition. Later, ``train.epochs`` may grow.

    Args:
        study: The study file.
        database: SQLite file; the study's folder is beside it.
        has_checkpoint: Whether the trial of this number has a checkpoint.
        backend: Optuna's storage in place of the database.

    Returns:
        The study, and ``train.epochs`` before if it has grown.

    Raises:
        ConfigError: The study was trained with another definition, or by another program or version.
    """
    storage, path = backend or open_storage(database), database.parent / study.name / "redefinition.json"
    opened = _load_or_create(study, storage)
    trials, before = opened.get_trials(deepcopy=False), opened.user_attrs.get(DEFINITION)
    preserved = PreservedState.read(path)  # left by a driver that was killed during a change
    check_format(opened, database)
    if preserved is None and before is None and trials:
        raise ConfigError(f"study {study.name!r} in {database} was not created by this program: use --name")
    if preserved is None and before and (lines := list(differences(before, study.definition()))):
        if trained := [trial for trial in trials if _was_trained(trial, has_checkpoint)]:
            where = f"study {study.name!r} in {database}"
            raise ConfigError(
                f"{where}: {shrinking}"
                if (shrinking := describe_shrinking(before, study, trained))
                else f"{where} was started with a different definition: {'; '.join(lines)}: "
                "use --fork NEW to start a study that takes over the trials that still fit"
            )
        preserved = PreservedState.of(opened)
        preserved.write(path)
    shorter = shorter_epochs(before, study) if before and preserved is None else None
    if preserved:
        opened = _recreate(study, storage, preserved)
        shutil.rmtree(path.parent / "trials", ignore_errors=True)
        path.unlink()
    elif shorter:
        assert isinstance(storage, optuna.storages.RDBStorage), "only a database outlives a search"
        lengthen(storage, opened, study, shorter)
        opened = _load_or_create(study, storage)
    _write_definition(opened, study)
    return opened, shorter


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """List the differences between two definitions of a study that it cannot resume with, one text per name.

    Args:
        before: As stored, possibly by an earlier version: fields that it lacks have their defaults.
        now: The study file's.
    """
    search = {**Search().definition(), **before["search"]}
    old = dict(flatten({**before, "base": with_defaults(before["base"]), "search": search}))
    new = dict(flatten(json.loads(json.dumps(now))))
    free = {f"base.{name}" for name in changeable(MayChange.ON_STUDY_RESUME)}
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name) and name not in free and not _grows(name, old, new):
            yield f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"


def _grows(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a field becomes larger that may. If the space varies it, its base is not what the trials were trained with."""
    field = name.removeprefix("base.")
    varies = f"space.{field}" in {**old, **new}
    return field in changeable(MayChange.IF_LARGER) and not varies and bool(new[name] > old[name])


@dataclass(frozen=True)
class PreservedState:
    """What a study keeps when it is created again with another definition.

    Optuna never changes a study's directions or a parameter's choices, so the study is deleted and created again. A file
    holds this state meanwhile, because the process may be killed between the two steps.
    """

    attributes: dict[str, Any]
    """User attributes of the study."""
    trials: list[dict[str, Any]]
    """User attributes of its trials, in the order of their numbers: trackers know the numbers of trials that were started."""

    @classmethod
    def of(cls, opened: optuna.Study) -> PreservedState:
        """The used numbers and resources, and the studies whose trials must be transferred again."""
        trials, attributes = opened.get_trials(deepcopy=False), opened.user_attrs
        names = (TRANSFERRED_FROM, PROJECTED_FROM)
        transferred = {t.user_attrs[name][0] for t in trials for name in names if name in t.user_attrs}
        kept = {SOURCES: sorted(transferred | set(attributes.get(SOURCES, ())))}
        if ELAPSED_S in attributes:
            kept[ELAPSED_S] = attributes[ELAPSED_S]
        unused = (TrialStatus.TRANSFERRED, TrialStatus.ENQUEUED)
        num_used = max((trial.number + 1 for trial in trials if status_of(trial) not in unused), default=0)
        return cls(kept, [_placeholder(trial) for trial in trials[:num_used]])

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        with atomic_write(path, durable=True) as file:
            file.write(json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> PreservedState | None:
        """Read the file; None if there is none."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _placeholder(trial: FrozenTrial) -> dict[str, Any]:
    """User attributes of the trial that takes another one's number: why it has no result, and the resources that it used."""
    used = {name: trial.user_attrs[name] for name in (GPU_S, WORKER_S) if name in trial.user_attrs}
    reason = trial.user_attrs.get(REASON, "the study file changed before the trial was trained")
    return {NOT_TRAINED: True, REASON: reason, **used}


def _load_or_create(study: Study, storage: optuna.storages.BaseStorage) -> optuna.Study:
    directions = list(study.search.objectives.values())
    return optuna.create_study(storage=storage, study_name=study.name, directions=directions, load_if_exists=True)


def _recreate(study: Study, storage: optuna.storages.BaseStorage, preserved: PreservedState) -> optuna.Study:
    optuna.delete_study(study_name=study.name, storage=storage)
    created = _load_or_create(study, storage)
    _write_definition(created, study)
    for key, value in preserved.attributes.items():
        created.set_user_attr(key, value)
    for attributes in preserved.trials:
        created.add_trial(optuna.create_trial(state=TrialState.FAIL, user_attrs=attributes))
    return created


def _write_definition(opened: optuna.Study, study: Study) -> None:
    if list(opened.metric_names or []) != list(study.search.objectives):
        opened.set_metric_names(list(study.search.objectives))
    attributes = {
        FORMAT: STUDY_FORMAT,  # before the definition, which is never without it
        BASE: dict(study.base),
        DEFINITION: study.definition(),
        CONFIRMING: study.search.confirm is not None,
    }
    for name, value in attributes.items():
        if opened.user_attrs.get(name) != json.loads(json.dumps(value)):
            opened.set_user_attr(name, value)


def _was_trained(trial: FrozenTrial, has_checkpoint: Callable[[int], bool]) -> bool:
    """Whether a trial has a score, or a checkpoint from which it resumes."""
    status = status_of(trial)
    if not status.is_trained:
        return False
    if status in (TrialStatus.COMPLETE, TrialStatus.PRUNED, TrialStatus.PAUSED) or curve(trial):
        return True
    return status is not TrialStatus.FAIL and has_checkpoint(trial.number)
