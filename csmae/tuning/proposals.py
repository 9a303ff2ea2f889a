"""What to train next: the sampler's proposals, less those that cannot be, cost too much or were trained before."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from csmae.config import Config, ConfigError
from csmae.study.study import MAX_GRID
from csmae.trials.attributes import NOT_TRAINED, ORIGIN, START
from csmae.trials.constraints import known_metrics, violation
from csmae.trials.store import TrialStore
from csmae.trials.trial import was_started, with_seed
from csmae.tuning.draft import Draft
from csmae.tuning.samplers import make_sampler

MAX_REJECTED = 20
"""Proposals of the sampler in a row that are refused before a point is drawn at random from those that are not."""

MAX_DRAWN = 1000
"""Points of a large space that are drawn before there is held to be none left; of one that is no larger than a grid, all."""


@dataclass(frozen=True)
class Proposal:
    """A trial to train."""

    trial: optuna.Trial
    values: dict[str, Any]
    config: Config
    resumed: bool = False
    """Whether an earlier driver began it."""


class Proposals:
    """Draws on the ledger; every refusal is written down there, with the trial that was found in the end.

    Args:
        ledger: Of the study.
    """

    def __init__(self, trial_store: TrialStore) -> None:
        self._trial_store, self._study = trial_store, trial_store.study
        self._own: dict[str, int] = {}
        self._inherited: dict[str, int] = {}
        self._untried = self._points()
        self.reason = ""
        """Of the last refusal."""
        for trial in trial_store.all_trials():
            self._remember(trial)

    def _remember(self, trial: FrozenTrial) -> None:
        """Note a trial's configuration, unless the driver died before the trial had all its values."""
        inherited = ORIGIN in trial.user_attrs
        if not was_started(trial) or (NOT_TRAINED in trial.user_attrs and not inherited):
            return
        values = self._trial_store.values(trial)
        if not trial.state.is_finished() and values != self._study.space.point(values):
            return
        known = self._inherited if inherited else self._own
        with suppress(ConfigError):  # one that the search's present settings would not allow
            known.setdefault(_key(self._study.resolve(with_seed(trial, values))), trial.number)

    def left(self) -> Proposal | None:
        """A trial that an earlier driver left in the middle, as it was; None where that one had not yet refused it."""
        trial = self._trial_store.next_interrupted()
        self._seed(trial.number)
        params, drawn = self._trial_store.frozen(trial).params, self._study.space.suggest(trial)
        exact = {name: value for name, value in params.items() if isinstance(value, float)}
        return self._check(trial, drawn | exact, resumed=True)  # its checkpoint has them to the last digit

    def _seed(self, number: int) -> None:
        """Have the values that an enqueued or interrupted trial lacks drawn as an uninterrupted search would."""
        self._trial_store.optuna_study.sampler = make_sampler(self._study.search, number)

    def new(self) -> Proposal | None:
        """A configuration that was not trained before; None when there is none left."""
        while self._trial_store.has_queued:
            self._seed(len(self._trial_store.all_trials()))
            trial = self._trial_store.next()
            if proposal := self._check(trial, self._study.space.suggest(trial)):
                return proposal
        draft = Draft(self._study, self._trial_store.optuna_study, self._trial_store.all_trials())
        while True:
            by_lot = self._study.search.sampler == "grid" or len(draft.refused) >= MAX_REJECTED
            values = self._by_lot() if by_lot else draft.draw()
            if values is None:
                return None
            reason, violations = self._objection(values, self._inherited | self._own)
            if not reason:
                return self._proposal(draft.begin(values), values)
            draft.refuse(values, reason, violations)
            self.reason = reason

    def confirmation(self) -> Proposal | None:
        """A repetition of one of the best trials with another seed; None when all are done.

        Each of them is repeated once before one is repeated twice: whenever a budget ends this, means over as many
        seeds as possible compare.
        """
        confirm = self._study.search.confirm
        if confirm is None:
            return None
        finalists = [
            (self._trial_store.num_repetitions(t.number), t) for t in self._trial_store.record_finalists(confirm.top)
        ]
        for times, best in sorted(finalists, key=lambda pair: pair[0]):
            if times < confirm.seeds and (proposal := self._repeat(best)):
                return proposal
        return None

    def _repeat(self, best: FrozenTrial) -> Proposal | None:
        """A repetition with the next seed that no trial of this configuration had; the space may vary the seed itself."""
        point = self._trial_store.values(best)
        seed = point.get("train.seed", self._study.space.base["train.seed"])
        twin: int | None = best.number
        try:
            while twin is not None:
                seed += 1
                values = {**point, "train.seed": seed}
                config = self._study.resolve(values)
                twin = self._own.get(_key(config))
        except ConfigError as error:  # the search's present settings do not allow it
            self.reason = str(error).splitlines()[0]
            return None
        trial = self._trial_store.repeat(best, seed)
        self._study.space.suggest(trial)
        return self._proposal(trial, values)

    def _check(self, trial: optuna.Trial, values: Mapping[str, Any], resumed: bool = False) -> Proposal | None:
        """A trial that has a number as a proposal, or None and refused."""
        values = with_seed(trial, values)
        known = self._own if START in trial.user_attrs else self._inherited | self._own
        reason, violations = self._objection(values, known, trial.number)
        if not reason:
            return self._proposal(trial, values, resumed)
        for name, over in violations.items():
            trial.set_constraint(name, over)
        self._trial_store.reject(trial, reason, steer=bool(violations))
        self.reason = reason
        return None

    def _proposal(self, trial: optuna.Trial, values: dict[str, Any], resumed: bool = False) -> Proposal:
        config = self._study.resolve(values)
        self._own.setdefault(_key(config), trial.number)
        return Proposal(trial, values, config, resumed)

    def _objection(
        self, values: Mapping[str, Any], known: Mapping[str, int], number: int | None = None
    ) -> tuple[str, dict[str, float]]:
        """Why a point is not trained, empty if it is; and by how much it breaks constraints on what it costs."""
        try:
            config = self._study.resolve(values)
        except ConfigError as error:
            return str(error).splitlines()[0], {}
        twin = known.get(_key(config), number)
        if twin != number:
            return f"same configuration as trial {twin}", {}
        reasons, violations = [], {}
        wanted = self._study.search.constraints
        metrics = known_metrics(config) if wanted else {}
        for name in wanted.keys() & metrics.keys():
            if (over := violation(metrics[name], wanted[name])) > 0:
                violations[name] = over
                reasons.append(f"{name} is {metrics[name]:.4g}, must be {wanted[name]}")
        return "; ".join(reasons), violations

    def _by_lot(self) -> dict[str, Any] | None:
        """The next point of the lot that may be trained, if there is one."""
        known = self._inherited | self._own
        for point in islice(self._untried, None if self._study.space.size <= MAX_GRID else MAX_DRAWN):
            self.reason = self._objection(point, known)[0]
            if not self.reason:
                return point
        return None

    def _points(self) -> Iterator[dict[str, Any]]:
        """Every point of a small space in random order; of a large one random points without end."""
        space, seed = self._study.space, self._study.search.seed
        if space.size > MAX_GRID:
            return space.samples(seed)
        points = list(space.grid())
        random.Random(seed).shuffle(points)
        return iter(points)


def _key(config: Config) -> str:
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)
