"""What a sampler sees of a study while it draws a trial that is not in the database yet."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from csmae.study.options import Search
from csmae.trials.optuna_private import in_first_generation, set_trial_id, storage_of
from csmae.trials.pareto import as_scores, order
from csmae.trials.trial import Values, curve

DRAFT_ID = -1
"""Optuna's id of the trial that is being drawn."""


class SamplerView:
    """Optuna's storage with the trial that is being drawn and with rejected points, without writing either of them.

    Args:
        optuna_study: The study in its database.
        trials: What the sampler sees besides the trial that is being drawn.
        number: Of the trial that is being drawn.
        attributes: System attributes of the study that the sampler has set while drawing this trial; it adds more.
    """

    def __init__(
        self, optuna_study: optuna.Study, trials: Sequence[FrozenTrial], number: int, attributes: dict[str, Any]
    ) -> None:
        self._storage, self._attributes = storage_of(optuna_study), attributes
        self.draft = optuna.create_trial(state=TrialState.RUNNING)
        self.draft.number = number
        set_trial_id(self.draft, DRAFT_ID)
        self._trials = [*trials, self.draft]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Sequence[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the visible trials in the given states."""
        trials = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return the trial that is being drawn, or one of the database."""
        return self.draft if trial_id == DRAFT_ID else self._storage.get_trial(trial_id)

    def set_trial_param(self, trial_id: int, name: str, value: float, distribution: BaseDistribution) -> None:
        """Set a parameter of the trial that is being drawn."""
        assert trial_id == DRAFT_ID
        self.draft.params[name] = distribution.to_external_repr(value)
        self.draft.distributions[name] = distribution

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set the sampler's attribute of the trial that is being drawn."""
        assert trial_id == DRAFT_ID
        self.draft.system_attrs[key] = value

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the sampler's attributes of the study."""
        return {**self._storage.get_study_system_attrs(study_id), **self._attributes}

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Keep the sampler's attribute of the study until the trial is created."""
        self._attributes[key] = value


def visible_trials(search: Search, sampler: BaseSampler, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Present a study's trials in the form from which a sampler learns the most."""
    if isinstance(sampler, NSGAIISampler):
        return [_with_generation(trial) for trial in trials]
    if isinstance(sampler, TPESampler) and len(search.objectives) > 1:
        return _sort_pruned(trials, search.signs)
    return list(trials)


def _with_generation(trial: FrozenTrial) -> FrozenTrial:
    """Put trials that nsga2 did not propose, such as starting points, into its first generation: it ignores them otherwise."""
    return in_first_generation(trial) if trial.state is TrialState.COMPLETE else trial


def _sort_pruned(trials: Iterable[FrozenTrial], signs: list[int]) -> list[FrozenTrial]:
    """Move pruned trials behind all others, sorted by their last epoch, then by Pareto front.

    With one objective tpe sorts them like this itself. With several it takes them in the given order: they have no
    intermediate values, because Optuna's hold a single number.
    """
    others: list[FrozenTrial] = []
    pruned: list[tuple[dict[int, Values], FrozenTrial]] = []
    for trial in trials:
        if trial.state is TrialState.PRUNED and (values_by_epoch := curve(trial)):
            pruned.append((values_by_epoch, trial))
        else:
            others.append(trial)
    by_front = order([as_scores(values[max(values)], signs) for values, _ in pruned])
    best_first = sorted((pruned[index] for index in by_front), key=lambda pair: -max(pair[0]))
    return others + [trial for _, trial in best_first]
