"""Optuna's storage for a study that only this process writes: what is unchanged is read from the database once."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


class SingleWriterStorage(BaseStorage):
    """Keeps the trials of one study in memory and writes every change to the database first.

    Optuna's own cache reads every unfinished trial again for each list of trials, because another process may have changed it.
    With hundreds of paused trials that takes a large part of a second for each proposal. This storage reads again only what
    went through it, so an unchanged trial is always the same object.

    Args:
        backend: The storage of the database.
        study_id: The study. No other process writes it while this storage is used.
    """

    def __init__(self, backend: BaseStorage, study_id: int) -> None:
        self._backend, self._study_id = backend, study_id
        self._trials: dict[int, FrozenTrial] = {}
        """By Optuna's id of the trial, in the order of the trials' numbers."""
        for trial in backend.get_all_trials(study_id, deepcopy=False):
            self._trials[backend.get_trial_id_from_study_id_trial_number(study_id, trial.number)] = trial
        self._changed: set[int] = set()
        """Ids of trials that were written after they were read."""
        self._user_attributes: dict[str, Any] | None = None
        self._system_attributes: dict[str, Any] | None = None

    # Trials.

    def _refresh(self) -> None:
        for trial_id in sorted(self._changed):
            self._trials[trial_id] = self._backend.get_trial(trial_id)
        self._changed.clear()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials in the given states, in the order of their numbers; without a deep copy, they must not be changed."""
        if study_id != self._study_id:
            return self._backend.get_all_trials(study_id, deepcopy, states)
        self._refresh()
        trials = [trial for trial in self._trials.values() if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a copy of a trial: ``optuna.Trial`` changes the one that it gets."""
        if trial_id not in self._trials:
            return self._backend.get_trial(trial_id)
        self._refresh()
        trial = copy.copy(self._trials[trial_id])
        trial.params, trial.distributions = dict(trial.params), dict(trial.distributions)
        trial.user_attrs, trial.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
        trial.intermediate_values = dict(trial.intermediate_values)
        return trial

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Return Optuna's id of a trial."""
        return self._backend.get_trial_id_from_study_id_trial_number(study_id, trial_number)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial."""
        trial_id = self._backend.create_new_trial(study_id, template_trial)
        if study_id == self._study_id:
            self._trials[trial_id] = self._backend.get_trial(trial_id)
        return trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Write a parameter."""
        self._note_change(trial_id)
        self._backend.set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Write the state, and the objectives of a complete trial."""
        self._note_change(trial_id)
        return self._backend.set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Write the objective after an epoch."""
        self._note_change(trial_id)
        self._backend.set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write an attribute of a trial."""
        self._note_change(trial_id)
        self._backend.set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Write an attribute that Optuna or a sampler gives a trial."""
        self._note_change(trial_id)
        self._backend.set_trial_system_attr(trial_id, key, value)

    def _note_change(self, trial_id: int) -> None:
        """Note a change before it is written: a write that fails may have changed the trial all the same."""
        if trial_id in self._trials:
            self._changed.add(trial_id)

    # Studies.

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a copy of a study's attributes."""
        if study_id != self._study_id:
            return self._backend.get_study_user_attrs(study_id)
        if self._user_attributes is None:
            self._user_attributes = self._backend.get_study_user_attrs(study_id)
        return dict(self._user_attributes)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return a copy of the attributes that Optuna or a sampler gives a study."""
        if study_id != self._study_id:
            return self._backend.get_study_system_attrs(study_id)
        if self._system_attributes is None:
            self._system_attributes = self._backend.get_study_system_attrs(study_id)
        return dict(self._system_attributes)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write an attribute of a study."""
        self._user_attributes = None
        self._backend.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write an attribute that Optuna or a sampler gives a study."""
        self._system_attributes = None
        self._backend.set_study_system_attr(study_id, key, value)

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """Create another study."""
        return self._backend.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        """Delete another study."""
        assert study_id != self._study_id, "the study in use is not deleted"
        self._backend.delete_study(study_id)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return Optuna's id of a study."""
        return self._backend.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return the name of a study."""
        return self._backend.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return a study's directions."""
        return self._backend.get_study_directions(study_id)

    def get_all_studies(self) -> list[Any]:
        """Return all studies of the database."""
        return self._backend.get_all_studies()
