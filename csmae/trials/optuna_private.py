"""Every use of a private name of Optuna, with the public form that is missing.

The tests run against the installed Optuna; an update that moves a name breaks only this file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna._hypervolume import compute_hypervolume
from optuna.samplers import NSGAIISampler, RandomSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from csmae.trials.single_writer import SingleWriterStorage


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage of a study. Optuna hands it to samplers as ``study._storage`` and to nobody else."""
    return study._storage


def single_writer(study: optuna.Study) -> optuna.Study:
    """The same study with a storage for the only process that writes it. Only ``study._study_id`` tells the study's id."""
    return optuna.load_study(
        study_name=study.study_name, storage=SingleWriterStorage(study._storage, study._study_id), sampler=study.sampler
    )


def frozen_trial(trial: optuna.Trial) -> FrozenTrial:
    """The stored state of one trial. ``Study.get_trials`` reads all trials of the study."""
    return trial.storage.get_trial(trial._trial_id)


def start_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Run an enqueued or interrupted trial.

    ``Study.ask`` starts only the first enqueued trial, and nothing public resumes one whose process died.
    """
    study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    return optuna.Trial(study, trial._trial_id)


def set_attribute(study: optuna.Study, trial: FrozenTrial, name: str, value: Any) -> None:
    """Set a user attribute of an enqueued trial, which has no live form yet."""
    study._storage.set_trial_user_attr(trial._trial_id, name, value)


def continue_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Return the live form of a trial that is RUNNING and has all of its parameters, without asking a sampler for more."""
    return optuna.Trial(optuna.Study(study.study_name, study._storage, RandomSampler(seed=0)), trial._trial_id)


def put_on_hold(trial: optuna.Trial) -> None:
    """Return a running trial to WAITING, with its number and its curve. ``Study.tell`` only ends trials."""
    trial.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def add_running_trial(study: optuna.Study, template: FrozenTrial, study_attributes: Mapping[str, Any]) -> optuna.Trial:
    """Add a trial that is in state RUNNING from the start, with all its parameters and a sampler's notes.

    ``Study.ask`` creates the trial before the sampler proposes anything, and ``Study.add_trial`` returns no live trial.

    Args:
        study: Gets the trial.
        template: The trial.
        study_attributes: System attributes that the sampler set on the study.
    """
    storage, study_id = study._storage, study._study_id
    for key, value in study_attributes.items():
        storage.set_study_system_attr(study_id, key, value)
    return optuna.Trial(study, storage.create_new_trial(study_id, template))


def set_trial_id(trial: FrozenTrial, trial_id: int) -> None:
    """Give a trial that is in no database the id by which a storage is asked for it. The public ``FrozenTrial`` has none."""
    trial._trial_id = trial_id


def in_first_generation(trial: FrozenTrial) -> FrozenTrial:
    """A copy that belongs to NSGA-II's first generation; the trial itself if it belongs to one.

    The sampler counts a trial only by a system attribute that it sets on its own proposals, and its name is private.
    """
    key = NSGAIISampler._get_generation_key()
    if key in trial.system_attrs:
        return trial
    trial = copy.copy(trial)
    trial._system_attrs = {**trial.system_attrs, key: 0}
    return trial


def hypervolume(losses: np.ndarray, reference: np.ndarray) -> float:
    """Volume that points dominate, up to a reference point; smaller is better. Optuna's samplers compute it, nothing public does."""
    return float(compute_hypervolume(losses, reference))


@dataclass(frozen=True)
class TrialChange:
    """What ``change_trials`` makes of a trial. One that is no longer complete has no objectives and no constraints."""

    trial: FrozenTrial
    state: TrialState
    attributes: Mapping[str, Any]
    """User attributes to set."""
    removed: tuple[str, ...] = ()
    """User attributes to remove."""


def change_trials(
    storage: RDBStorage, study: optuna.Study, changes: Iterable[TrialChange], attributes: Mapping[str, Any]
) -> None:
    """Change trials, finished ones too, and user attributes of their study in one transaction.

    Optuna changes no finished trial, removes nothing, and writes each value in a transaction of its own.

    Args:
        storage: The database.
        study: Caches finished trials, so it must be loaded again.
        changes: Of the trials.
        attributes: User attributes of the study to set.
    """
    with Session(storage.engine) as session, session.begin():
        owner = {"study_id": study._study_id}
        _replace(session, models.StudyUserAttributeModel, owner, attributes)
        for change in changes:
            owner = {"trial_id": change.trial._trial_id}
            stored = session.get_one(models.TrialModel, change.trial._trial_id)
            stored.state = change.state
            stored.datetime_complete = datetime.now() if change.state.is_finished() else None
            session.query(models.TrialValueModel).filter_by(**owner).delete()
            constraints = [f"constraints:{name}" for name in change.trial.constraints]
            _replace(session, models.TrialSystemAttributeModel, owner, {}, constraints)
            _replace(session, models.TrialUserAttributeModel, owner, change.attributes, change.removed)


def _replace(
    session: Session, model: Any, owner: Mapping[str, int], new: Mapping[str, Any], removed: Iterable[str] = ()
) -> None:
    """Set and remove attributes of the study or trial that ``owner`` names."""
    session.query(model).filter_by(**owner).filter(model.key.in_([*new, *removed])).delete()
    session.add_all(model(**owner, key=key, value_json=json.dumps(value)) for key, value in new.items())
