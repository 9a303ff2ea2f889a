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
from csmae.trials.pareto import order
from csmae.trials.trial import Values, curve
from csmae.tuning.early_stopping import signed

DRAFT_ID = -1
"""Id by which a sampler knows the draft."""


class SamplerView:
    """Optuna's storage as a sampler sees it during a draw: with the draft as a running trial, and the refusals.

    Args:
        record: The study in its database.
        trials: What is there besides the draft.
        number: That the draft will have.
        attributes: Of the study, that the sampler set during earlier draws of the draft, and gets its new ones.
    """

    def __init__(
        self, record: optuna.Study, trials: Sequence[FrozenTrial], number: int, attributes: dict[str, Any]
    ) -> None:
        self._storage, self._attributes = record._storage, attributes
        self.draft = optuna.create_trial(state=TrialState.RUNNING)
        self.draft.number, self.draft._trial_id = number, DRAFT_ID
        self._trials = [*trials, self.draft]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Sequence[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials in the given states, refusals and draft among them."""
        found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """The draft, or a trial of the database."""
        return self.draft if trial_id == DRAFT_ID else self._storage.get_trial(trial_id)

    def set_trial_param(self, trial_id: int, name: str, value: float, distribution: BaseDistribution) -> None:
        """Note a value of the draft."""
        assert trial_id == DRAFT_ID
        self.draft.params[name] = distribution.to_external_repr(value)
        self.draft.distributions[name] = distribution

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Note what the sampler remembers of the draft."""
        assert trial_id == DRAFT_ID
        self.draft.system_attrs[key] = value

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """What the sampler remembers of the study."""
        return {**self._storage.get_study_system_attrs(study_id), **self._attributes}

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Note what the sampler remembers of the study, until the draft is accepted."""
        self._attributes[key] = value


def visible_trials(search: Search, sampler: BaseSampler, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """A study's trials as a sampler must see them to learn from all that it can learn from."""
    if isinstance(sampler, NSGAIISampler):
        return [_of_first_generation(trial) for trial in trials]
    if isinstance(sampler, TPESampler) and len(search.objectives) > 1:
        return _best_stopped_first(trials, search.signs)
    return list(trials)


def _of_first_generation(trial: FrozenTrial) -> FrozenTrial:
    """Trials that another one's proposal began, such as starting points, belong to no generation: nsga2 would leave them out."""
    key = NSGAIISampler._get_generation_key()
    if trial.state is not TrialState.COMPLETE or key in trial.system_attrs:
        return trial
    trial = copy.copy(trial)
    trial._system_attrs = {**trial.system_attrs, key: 0}
    return trial


def _best_stopped_first(trials: Iterable[FrozenTrial], signs: list[int]) -> list[FrozenTrial]:
    """Stopped trials after all others, those that came furthest first, and of these the best fronts.

    With one objective tpe sorts them so by their curves. With several it has no curves, for Optuna's hold one value, and takes
    them in the order in which it gets them.
    """
    others: list[FrozenTrial] = []
    stopped: list[tuple[dict[int, Values], FrozenTrial]] = []
    for trial in trials:
        if trial.state is TrialState.PRUNED and (course := curve(trial)):
            stopped.append((course, trial))
        else:
            others.append(trial)
    best_first = [stopped[index] for index in order([signed(course[max(course)], signs) for course, _ in stopped])]
    best_first.sort(key=lambda pair: -max(pair[0]))
    return others + [trial for _, trial in best_first]
