"""Which trial to train next: an interrupted one, an enqueued one, a new point of the sampler, or a confirmation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from csmae.config import Config, ConfigError
from csmae.model.cost import cost_metrics
from csmae.study.options import violation
from csmae.study.study import MAX_GRID
from csmae.study.values import Value
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import ASSIGNMENTS
from csmae.trials.leaderboard import leaderboard
from csmae.trials.lineage import copy_attributes, trained_values
from csmae.trials.optuna_private import frozen_trial
from csmae.trials.store import TrialStore
from csmae.trials.trial import (
    assigned_until,
    assignment,
    assignments,
    confirmed_number,
    is_never_stopped,
    is_starting_point,
    num_epochs,
    params_of,
    parent_number,
    status_of,
    with_seed,
)
from csmae.tuning.draft import Draft, Rejection
from csmae.tuning.prior_draws import order_by_priors
from csmae.tuning.race import find_finalists, next_in_race, next_in_turn
from csmae.tuning.samplers import make_sampler
from csmae.tuning.strategy.base import NewTrial

MAX_REJECTED = 20
"""Consecutive rejected proposals of the sampler, after which points are drawn at random."""

MAX_DRAWN = 1000
"""Random points of a large space that are tried before the space counts as exhausted; a small space is tried whole."""


@dataclass(frozen=True)
class Proposal:
    """A trial to train."""

    trial: optuna.Trial
    values: dict[str, Any]
    config: Config
    until: int
    """Epoch after which the trial pauses, or ends if its training is complete."""
    reason: str
    """Why it is proposed or resumed, for people."""
    resumed: bool = False
    """Whether the trial was started before, and was interrupted or paused since."""


class Proposals:
    """Proposes trials of a study and records every rejected point, together with the trial that is found in the end.

    A point is rejected if its configuration is invalid, was trained before or violates a constraint on its cost.

    Args:
        trial_store: Of the study.
    """

    def __init__(self, trial_store: TrialStore) -> None:
        self._trial_store, self._study = trial_store, trial_store.study
        self._own: dict[str, int] = {}
        """By configuration, the number of the trial that trains it."""
        self._transferred: dict[str, int] = {}
        """The same for trials of other studies."""
        self._random_points = self._draw_points()
        self.rejection_reason = ""
        """Why the last point was rejected."""
        for trial in trial_store.all_trials():
            self._remember(trial)

    def _remember(self, trial: FrozenTrial) -> None:
        """Note a trial's configuration, unless the driver died before the trial had all of its values."""
        status = status_of(trial)
        if status in (TrialStatus.ENQUEUED, TrialStatus.REJECTED):
            return
        values = params_of(trial)
        if not trial.state.is_finished() and values != self._study.space.point(values):
            return
        known = self._transferred if status is TrialStatus.TRANSFERRED else self._own
        with suppress(ConfigError):  # the search's present settings do not allow the configuration
            known.setdefault(_key(self._study.resolve(trained_values(trial, values))), trial.number)

    def interrupted(self) -> Proposal | None:
        """Resume the next interrupted trial; None if it is rejected, which an earlier driver had yet to do."""
        trial = self._trial_store.next_interrupted()
        self._seed_sampler(trial.number)
        return self._accept(trial, self._suggest(trial), resumed=True)

    def paused(self, number: int, until: int, reason: str) -> Proposal | None:
        """Resume a paused trial; None if the search's present settings do not allow its configuration.

        Args:
            number: The trial.
            until: Epoch after which it pauses again, or ends.
            reason: Why it is resumed.
        """
        trial = self._trial_store.paused_trial(number)
        values = with_seed(trial, self._suggest(trial))
        if self._check(values, {}):
            return None
        further = max(until, num_epochs(frozen_trial(trial)) + 1)  # an epoch without a score may be at a rung already
        self._trial_store.assign(trial, min(further, self._study.resolve(values).train.epochs), reason)
        return self._propose(trial, values, resumed=True)

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """A trial's values; those that it has keep the exact floats, which its checkpoint has."""
        params, drawn = frozen_trial(trial).params, self._study.space.suggest(trial)
        return drawn | {name: value for name, value in params.items() if isinstance(value, float)}

    def _seed_sampler(self, number: int) -> None:
        """Make the sampler draw missing values of an enqueued or interrupted trial as in an uninterrupted search."""
        self._trial_store.optuna_study.sampler = make_sampler(self._study.search, number)

    def starting_point(self) -> Proposal | None:
        """Propose the next starting point, which is trained to its end; None if there is none left."""
        return self._enqueued(is_starting_point, None)

    def _enqueued(self, is_wanted: Callable[[FrozenTrial], bool], decision: NewTrial | None) -> Proposal | None:
        while enqueued := self._trial_store.next_enqueued(is_wanted):
            self._seed_sampler(len(self._trial_store.all_trials()))
            piece = assignment(0, decision.until, decision.reason) if decision else None
            trial = self._trial_store.start_enqueued(enqueued, piece)
            if proposal := self._accept(trial, self._study.space.suggest(trial)):
                return proposal
        return None

    def new(self, decision: NewTrial) -> Proposal | None:
        """Propose a configuration that was not trained before; None if there is none left.

        Enqueued points come first, then the decision's own or the sampler's, and random ones if too many are rejected. A trial
        that copies another one's checkpoint may have a configuration that was trained before.
        """
        if decision.parent is None and (proposal := self._enqueued(lambda trial: True, decision)):
            return proposal
        known = self._transferred | self._own if decision.parent is None else {}
        draft = Draft(self._study, self._trial_store.optuna_study, self._trial_store.all_trials())
        while True:
            values = self._next_point(draft, decision.points)
            if values is None:
                return None
            rejection = self._check(values, known)
            if rejection is None:
                return self._propose(draft.create_trial(values, self._attributes(decision, values)), values)
            draft.rejections.append(rejection)

    def _next_point(self, draft: Draft, points: Iterator[Mapping[str, Value]] | None) -> dict[str, Any] | None:
        if len(draft.rejections) < MAX_REJECTED:
            if points is not None and (point := next(points, None)) is not None:
                return self._study.space.point(point)
            if points is None and self._study.search.sampler != "grid":
                return draft.draw()
        return self._random_point()

    def _attributes(self, decision: NewTrial, values: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes that a new trial has from the start, so that a driver that dies after its creation loses nothing."""
        until = min(decision.until, self._study.resolve(values).train.epochs)
        if decision.parent is None:
            return {ASSIGNMENTS: [assignment(0, until, decision.reason)]}
        parent = self._trial_store.all_trials()[decision.parent]
        start = num_epochs(parent)
        attributes = copy_attributes(parent, start, values, self._study.space)
        return {ASSIGNMENTS: [assignment(start, until, decision.reason)], **attributes}

    def confirmation(self) -> Proposal | None:
        """Train one of the finalists with another seed; None if the confirmation is over or depends on running trials."""
        confirm = self._study.search.confirm
        if confirm is None:
            return None
        ranked = leaderboard(self._trial_store.optuna_study).ranked
        self._trial_store.record_finalists(ranked[: confirm.top])
        trials = {trial.number: trial for trial in ranked}
        finalists, choose = find_finalists(self._trial_store), next_in_race if confirm.race else next_in_turn
        while (number := choose(finalists)) is not None:
            if proposal := self._confirm(trials[number]):
                return proposal
            finalists = [replace(f, num_left=0) if f.number == number else f for f in finalists]
        return None

    def _confirm(self, finalist: FrozenTrial) -> Proposal | None:
        """Train a configuration with the next seed that it has not had; the space may vary the seed itself."""
        point = params_of(finalist)
        seed = point.get("train.seed", self._study.space.base["train.seed"])
        duplicate: int | None = finalist.number
        try:
            while duplicate is not None:
                seed += 1
                values = {**point, "train.seed": seed}
                repeated = {**trained_values(finalist, point), "train.seed": seed}
                duplicate = self._own.get(_key(self._study.resolve(repeated)))
        except ConfigError:  # the search's present settings do not allow the configuration
            return None
        trial = self._trial_store.start_confirmation(finalist, seed)
        self._study.space.suggest(trial)
        return self._propose(trial, values)

    def _accept(self, trial: optuna.Trial, values: Mapping[str, Any], resumed: bool = False) -> Proposal | None:
        """Propose a trial that exists in the trial store; if it is rejected, end it and return None."""
        values = with_seed(trial, values)
        known = self._own if is_never_stopped(trial) else self._transferred | self._own
        if parent_number(trial) is not None:
            known = {}
        rejection = self._check(values, known, trial.number)
        if rejection is None:
            return self._propose(trial, values, resumed)
        self._trial_store.reject(trial, rejection.reason, rejection.violations)
        return None

    def _propose(self, trial: optuna.Trial, values: dict[str, Any], resumed: bool = False) -> Proposal:
        config = self._study.resolve(trained_values(trial, values))
        self._own.setdefault(_key(config), trial.number)
        if not assignments(frozen_trial(trial)):
            self._trial_store.assign(trial, config.train.epochs, _reason_to_finish(trial))
        stored = frozen_trial(trial)
        until, reason = assigned_until(stored, config.train.epochs), assignments(stored)[-1]["reason"]
        return Proposal(trial, values, config, until, reason, resumed)

    def _check(
        self, values: Mapping[str, Any], known: Mapping[str, int], number: int | None = None
    ) -> Rejection | None:
        """Check whether a point can be trained.

        Args:
            values: The point.
            known: By configuration, the number of the trial that has it.
            number: Of the point's own trial, if it has one.
        """
        try:
            config = self._study.resolve(values)
        except ConfigError as error:
            return self._reject(values, str(error).splitlines()[0])
        duplicate = known.get(_key(config), number)
        if duplicate != number:
            return self._reject(values, f"same configuration as trial {duplicate}")
        constraints = self._study.search.constraints
        metrics = cost_metrics(config) if constraints else {}
        excess = {name: violation(metrics[name], bound) for name, bound in constraints.items() if name in metrics}
        violations = {name: value for name, value in excess.items() if value > 0}
        if not violations:
            return None
        reasons = (f"{name} is {metrics[name]:.4g}, must be {constraints[name]}" for name in violations)
        return self._reject(values, "; ".join(reasons), violations)

    def _reject(self, values: Mapping[str, Any], reason: str, violations: Mapping[str, float] = {}) -> Rejection:
        self.rejection_reason = reason
        return Rejection(dict(values), reason, dict(violations))

    def _random_point(self) -> dict[str, Any] | None:
        """Draw the next random point that can be trained; None if there is none."""
        known = self._transferred | self._own
        for point in islice(self._random_points, None if self._study.space.size <= MAX_GRID else MAX_DRAWN):
            if self._check(point, known) is None:
                self.rejection_reason = ""
                return point
        return None

    def _draw_points(self) -> Iterator[dict[str, Any]]:
        """Draw all points of a small space in random order, likely ones first; of a large space, random points without end."""
        space, seed = self._study.space, self._study.search.seed
        if space.size > MAX_GRID:
            return space.samples(seed)
        points = list(space.grid())
        random.Random(seed).shuffle(points)
        return (points[index] for index in order_by_priors(space, points, seed)) if space.has_priors else iter(points)


def _reason_to_finish(trial: optuna.Trial) -> str:
    """Why a trial is trained to its end that no strategy has proposed."""
    if (confirmed := confirmed_number(trial)) is not None:
        return f"confirms trial {confirmed} with another seed"
    return "starting point" if is_starting_point(trial) else "continues a trial of an earlier version"


def _key(config: Config) -> str:
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)
