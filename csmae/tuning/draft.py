"""A trial before it exists: its values are drawn until a point is accepted, so rejected points take no trial numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from csmae.study.study import Study
from csmae.study.values import Value
from csmae.trials.attributes import REJECTIONS
from csmae.trials.optuna_private import add_running_trial
from csmae.trials.trial import confirmed_number, params_of, parent_number
from csmae.tuning.prior_draws import draw_from_priors
from csmae.tuning.sampler_view import DRAFT_ID, SamplerView, visible_trials
from csmae.tuning.samplers import make_sampler


@dataclass(frozen=True)
class Rejection:
    """A proposed point that is not trained."""

    values: dict[str, Value]
    reason: str
    violations: dict[str, float]
    """By how much the point violates each constraint that it violates; tpe learns from these."""


class Draft:
    """Draws points from the study's sampler until one is accepted.

    Rejections are written only together with the trial: if the driver is killed before, the next one draws the same points
    again.

    Args:
        study: The study that proposes the trial.
        optuna_study: The same study in Optuna's database.
        trials: All trials of the study, rejected and transferred ones included.
    """

    def __init__(self, study: Study, optuna_study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._optuna_study, self._trials = study, optuna_study, trials
        self._num_earlier = sum(len(trial.user_attrs.get(REJECTIONS, ())) for trial in trials)
        self._trial_attributes: dict[str, Any] = {}
        self._study_attributes: dict[str, Any] = {}
        self.rejections: list[Rejection] = []
        """Points that were drawn and rejected."""

    def draw(self) -> dict[str, Value]:
        """Draw the next point, from the priors or with the sampler.

        The seed counts trials and rejections, so a restarted search draws the same points as an uninterrupted one.
        """
        search = self._study.search
        if self._study.space.has_priors and (point := draw_from_priors(self._study, self._tried())):
            self._trial_attributes = {}
            return point
        sampler = make_sampler(search, len(self._trials) + self._num_earlier + len(self.rejections))
        trials = visible_trials(search, sampler, self._observations())
        view = SamplerView(self._optuna_study, trials, len(self._trials), self._study_attributes)
        study = optuna.Study(self._optuna_study.study_name, view, sampler)  # type: ignore[arg-type]  # all that samplers use
        values = self._study.space.suggest(optuna.Trial(study, DRAFT_ID))
        self._trial_attributes = view.draft.system_attrs
        return values

    def create_trial(self, values: Mapping[str, Value], attributes: Mapping[str, Any]) -> optuna.Trial:
        """Create the trial, with the next number.

        Args:
            values: Its point.
            attributes: User attributes that it has from the start.
        """
        if self.rejections:
            attributes = {**attributes, REJECTIONS: [asdict(rejection) for rejection in self.rejections]}
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params=self._study.space.encode(values),
            distributions=self._distributions(values),
            user_attrs=dict(attributes),
            system_attrs=self._trial_attributes,
        )
        return add_running_trial(self._optuna_study, template, self._study_attributes)

    def _tried(self) -> list[dict[str, Value]]:
        """The points of all trials and rejections."""
        rejected = [*chain.from_iterable(map(rejections, self._trials)), *self.rejections]
        return [*map(params_of, self._trials), *(rejection.values for rejection in rejected)]

    def _distributions(self, values: Mapping[str, Value]) -> dict[str, BaseDistribution]:
        return {name: self._study.space.domains[name].distribution for name in values}

    def _observations(self) -> Iterator[FrozenTrial]:
        """The study's trials without confirmations and copies, each after the points that were rejected before it."""
        for trial in self._trials:
            yield from self._as_pruned(rejections(trial), trial.number)
            if confirmed_number(trial) is None and parent_number(trial) is None:
                yield trial
        yield from self._as_pruned(self.rejections, len(self._trials))

    def _as_pruned(self, rejected: Sequence[Rejection], number: int) -> Iterator[FrozenTrial]:
        """Rejections that violate constraints, as pruned trials from which the sampler learns."""
        for rejection in rejected:
            if rejection.violations:
                trial = optuna.create_trial(
                    state=TrialState.PRUNED,
                    params=self._study.space.encode(rejection.values),
                    distributions=self._distributions(rejection.values),
                    constraints=rejection.violations,
                )
                trial.number = number - 1  # samplers sort by number, and the sort is stable
                yield trial


def rejections(trial: FrozenTrial) -> list[Rejection]:
    """The points that were rejected before a trial."""
    return [Rejection(**fields) for fields in trial.user_attrs.get(REJECTIONS, ())]
