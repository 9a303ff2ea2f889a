"""Syne Tune's schedulers, called as its ``Tuner`` calls them, with their default settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from datetime import datetime
from typing import Any

from curves.clock import Ending, Piece
from curves.tables import Table
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import loguniform, uniform
from syne_tune.optimizer.baselines import ASHA, MOBSTER, DyHPO, HyperTune
from syne_tune.optimizer.scheduler import SchedulerDecision

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "syne-tune asha": (ASHA, {"type": "promotion"}),
    "syne-tune mobster": (MOBSTER, {"type": "promotion"}),
    "syne-tune hypertune": (HyperTune, {"type": "promotion", "brackets": 4}),
    "syne-tune dyhpo": (DyHPO, {}),
}
"""Class and options. HyperTune is meant for several brackets; four is what Syne Tune's own benchmarks use."""

UNTIL = "epochs"
"""Name of the setting that limits a trial's epochs; a scheduler that pauses trials sets it to the next rung."""


class SyneTune:
    """A scheduler of Syne Tune."""

    def __init__(self, name: str, table: Table, seed: int, workers: int) -> None:
        logging.getLogger("syne_tune").setLevel(logging.ERROR)
        scheduler, options = SCHEDULERS[name]
        kinds = [loguniform if log else uniform for log in table.log]
        space: dict[str, Any] = {
            name: kind(*ends) for name, kind, ends in zip(table.names, kinds, table.bounds, strict=True)
        }
        space[UNTIL] = table.epochs
        search_options = {"debug_log": False, **options.get("search_options", {})}
        self._scheduler = scheduler(
            space,
            metric="loss",
            mode="min",
            resource_attr="epoch",
            max_resource_attr=UNTIL,
            random_seed=seed,
            **{**options, "search_options": search_options},
        )
        self._names, self._trials = table.names, dict[int, Trial]()
        self._decision, self._result = SchedulerDecision.CONTINUE, dict[str, Any]()

    def ask(self) -> Piece | None:
        """Start or resume a trial."""
        suggestion = self._scheduler.suggest(trial_id=len(self._trials))
        if suggestion is None:
            return None
        if suggestion.spawn_new_trial_id:
            trial = Trial(len(self._trials), dict(suggestion.config), datetime.now())
            self._trials[trial.trial_id] = trial
            self._scheduler.on_trial_add(trial=trial)
            point = {name: float(suggestion.config[name]) for name in self._names}
            return Piece(trial.trial_id, int(trial.config[UNTIL]), point)
        trial = self._trials[suggestion.checkpoint_trial_id]
        if suggestion.config is not None:
            trial.config = dict(suggestion.config)
        return Piece(trial.trial_id, int(trial.config[UNTIL]))

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        """Pass the loss on; a diverged trial has failed."""
        assert isinstance(key, int)
        if math.isnan(loss):
            return False
        trial, self._result = self._trials[key], {"loss": loss, "epoch": epoch}
        self._decision = self._scheduler.on_trial_result(trial=trial, result=self._result)
        if self._decision == SchedulerDecision.CONTINUE:
            return True
        self._scheduler.on_trial_remove(trial=trial)
        return False

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        """Tell what the scheduler did not decide."""
        assert isinstance(key, int)
        if ending is Ending.DIVERGED:
            self._scheduler.on_trial_error(self._trials[key])
        elif self._decision == SchedulerDecision.CONTINUE:
            self._scheduler.on_trial_complete(self._trials[key], self._result)
