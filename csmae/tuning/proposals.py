"""What to train next: the sampler's proposals, less those that cannot be, cost too much or were trained before."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.config import Config, ConfigError
from csmae.model.cost import cost
from csmae.tuning.ledger import CONFIRMS, Ledger
from csmae.tuning.options import bound

MAX_REFUSED = 100
"""Proposals in a row that are refused before the space is given up."""

MAX_REPEATED = 20
"""Proposals in a row that were trained before, after which a finite space is searched for an untried point."""

MAX_LISTED = 10_000
"""Points of a finite space that are looked through for untried ones."""


class SpaceError(ConfigError):
    """Next to no proposal of the sampler makes a configuration that may be trained."""


@dataclass(frozen=True)
class Proposal:
    """A trial to train."""

    trial: optuna.Trial
    values: dict[str, Any]
    config: Config


class Proposals:
    """Draws on the ledger; every refusal is written down there, as failed and not trained.

    Args:
        ledger: Of the study.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._study = ledger, ledger.study
        self._seen: dict[str, int] = {}
        self._random = random.Random(ledger.study.search.seed)
        for trial in ledger.all_trials():
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
                self._remember(trial)

    def _remember(self, trial: FrozenTrial) -> None:
        try:
            self._seen.setdefault(_key(self._study.resolve(trial.params)), trial.number)
        except ConfigError:  # a trial of which the driver died before it had all its values
            return

    def left(self) -> Proposal:
        """A trial that an earlier driver left in the middle, as it was."""
        trial = self._ledger.next()
        return self._accept(trial, self._study.space.suggest(trial))

    def new(self) -> Proposal | None:
        """A configuration that was not trained before; None when there is none left.

        Raises:
            SpaceError: The space has next to nothing that may be trained.
        """
        reason, repeated = "", 0
        for _ in range(MAX_REFUSED):
            if self._study.search.sampler == "grid" and not self._ledger.num_waiting:
                return None
            trial = self._ledger.next()
            values = self._study.space.suggest(trial)
            reason, steer = self._objection(trial, values)
            if not reason:
                return self._accept(trial, values)
            self._ledger.refuse(trial, reason, steer)
            repeated += reason.startswith("same ")
            if repeated >= MAX_REPEATED and not self._line_up_untried():
                return None
        raise SpaceError(f"the space has next to nothing to train; the last of {MAX_REFUSED} proposals: {reason}")

    def _objection(self, trial: optuna.Trial, values: Mapping[str, Any]) -> tuple[str, bool]:
        """Why a proposal is not trained, empty if it is; and whether the sampler shall keep away from its like."""
        try:
            config = self._study.resolve(values)
        except ConfigError as error:
            return str(error).splitlines()[0], False
        twin = self._seen.get(_key(config))
        if twin is not None:
            return f"same configuration as trial {twin}", False
        broken = []
        for name, wanted in self._study.search.constraints.items():
            known = known_metrics(config)
            if name in known and (over := violation(known[name], wanted)) > 0:
                trial.set_constraint(name, over)
                broken.append(f"{name} is {known[name]:.4g}, must be {wanted}")
        return "; ".join(broken), True

    def _line_up_untried(self) -> bool:
        """Put an untried point of a finite space in line, drawn at random; returns whether there was one."""
        space = self._study.space
        if space.size > MAX_LISTED:
            return True  # the sampler will find one
        points = list(space.grid())
        self._random.shuffle(points)
        for point in points:
            try:
                tried = _key(self._study.resolve(point)) in self._seen
            except ConfigError:
                continue
            if not tried:
                self._ledger.enqueue(point)
                return True
        return False

    def confirmation(self) -> Proposal | None:
        """A repetition of one of the best trials with another seed; None when all are done."""
        if not self._ledger.num_waiting:
            self._line_up_repetitions()
        if not self._ledger.num_waiting:
            return None
        trial = self._ledger.next()
        return self._accept(trial, self._study.space.suggest(trial))

    def _line_up_repetitions(self) -> None:
        confirm = self._study.search.confirm
        if confirm is None:
            return
        done = {
            (t.user_attrs[CONFIRMS], t.user_attrs["seed"]) for t in self._ledger.trials() if CONFIRMS in t.user_attrs
        }
        for best in self._ledger.ranked()[: confirm.top]:
            first = self._study.resolve(best.params).train.seed + 1
            for seed in range(first, first + confirm.seeds):
                if (best.number, seed) not in done:
                    self._ledger.enqueue(best.params, start=True, confirms=best.number, seed=seed)

    def _accept(self, trial: optuna.Trial, values: dict[str, Any]) -> Proposal:
        seed = {"train.seed": trial.user_attrs["seed"]} if "seed" in trial.user_attrs else {}
        config = self._study.resolve(values | seed)
        self._seen.setdefault(_key(config), trial.number)
        return Proposal(trial, values | seed, config)


def known_metrics(config: Config) -> dict[str, float]:
    """Metrics of a configuration that need no training."""
    spent = cost(config)
    return {f"cost/{name}": float(value) for name, value in spent._asdict().items()}


def violation(value: float, wanted: str) -> float:
    """By how much a metric breaks its constraint; not positive where it keeps to it."""
    sign, limit = bound(wanted)
    return value - limit if sign == "<=" else limit - value


def _key(config: Config) -> str:
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)
