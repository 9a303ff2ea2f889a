"""The next trial while its values are looked for: points that are refused take no trial numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from csmae.study.study import Study
from csmae.study.values import Value
from csmae.trials.attributes import CONFIRMS
from csmae.tuning.sampler_view import DRAFT_ID, SamplerView, visible_trials
from csmae.tuning.samplers import make_sampler

REFUSED = "refused"
"""User attribute of a trial: the points that were proposed for it and refused, as fields of ``Rejection``."""


@dataclass(frozen=True)
class Rejection:
    """A point that the sampler proposed and that is not trained."""

    values: dict[str, Value]
    reason: str
    violations: dict[str, float]
    """By how much it breaks each constraint: tpe learns from these to keep away."""


class Draft:
    """Draws points from the study's sampler until one is accepted.

    All that is written, the refusals included, is written with the trial, at once: a driver that is killed before
    draws the same points again.

    Args:
        study: Ours.
        record: Optuna's, in its database.
        trials: All that Optuna knows of the study.
    """

    def __init__(self, study: Study, record: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._record, self._trials = study, record, trials
        self._earlier = sum(len(trial.user_attrs.get(REFUSED, ())) for trial in trials)
        self._trial_attributes: dict[str, Any] = {}
        self._study_attributes: dict[str, Any] = {}
        self.refused: list[Rejection] = []

    def draw(self) -> dict[str, Value]:
        """A point that the sampler proposes.

        The sampler is seeded by the number of trials and refusals, so that a restarted search draws as an uninterrupted one.
        """
        search = self._study.search
        sampler = make_sampler(search, len(self._trials) + self._earlier + len(self.refused))
        seen = visible_trials(search, sampler, self._seen())
        view = SamplerView(self._record, seen, len(self._trials), self._study_attributes)
        study = optuna.Study(self._record.study_name, view, sampler)  # type: ignore[arg-type]  # has what samplers ask of it
        values = self._study.space.suggest(optuna.Trial(study, DRAFT_ID))
        self._trial_attributes = view.draft.system_attrs
        return values

    def refuse(self, values: Mapping[str, Value], reason: str, violations: Mapping[str, float]) -> None:
        """Note that a point is not trained."""
        self.refused.append(Rejection(dict(values), reason, dict(violations)))

    def begin(self, values: Mapping[str, Value]) -> optuna.Trial:
        """Make the trial, with the next number."""
        storage, study_id = self._record._storage, self._record._study_id
        for key, value in self._study_attributes.items():
            storage.set_study_system_attr(study_id, key, value)
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params=self._study.space.encode(values),
            distributions=self._distributions(values),
            user_attrs={REFUSED: [asdict(refusal) for refusal in self.refused]} if self.refused else {},
            system_attrs=self._trial_attributes,
        )
        return optuna.Trial(self._record, storage.create_new_trial(study_id, template))

    def _distributions(self, values: Mapping[str, Value]) -> dict[str, BaseDistribution]:
        return {name: self._study.space.domains[name].distribution for name in values}

    def _seen(self) -> Iterator[FrozenTrial]:
        """The study's trials, each after the points that were refused before it; repetitions are no further points."""
        for trial in self._trials:
            if REFUSED in trial.user_attrs:
                yield from self._steering(rejections(trial), trial.number)
            if CONFIRMS not in trial.user_attrs:
                yield trial
        yield from self._steering(self.refused, len(self._trials))

    def _steering(self, refused: Sequence[Rejection], number: int) -> Iterator[FrozenTrial]:
        """Refusals that the sampler learns from, as stopped trials that break constraints."""
        for refusal in refused:
            if refusal.violations:
                trial = optuna.create_trial(
                    state=TrialState.PRUNED,
                    params=self._study.space.encode(refusal.values),
                    distributions=self._distributions(refusal.values),
                    constraints=refusal.violations,
                )
                trial.number = number - 1  # samplers sort by it, and what is alike keeps its order
                yield trial


def rejections(trial: FrozenTrial) -> list[Rejection]:
    """The points that were refused before a trial."""
    return [Rejection(**fields) for fields in trial.user_attrs.get(REFUSED, ())]
