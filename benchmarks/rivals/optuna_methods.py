"""Optuna alone, with its ask-and-tell interface and default settings."""

from __future__ import annotations

import math
from collections.abc import Hashable

import optuna
from curves.clock import Ending, Piece
from curves.tables import Table
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner
from optuna.trial import TrialState

METHODS = ("optuna tpe+hyperband", "optuna tpe")


class Optuna:
    """Optuna's TPE, with or without its Hyperband, which stops trials for good."""

    def __init__(self, name: str, table: Table, seed: int, workers: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner: BasePruner = NopPruner()
        if name.endswith("hyperband"):
            pruner = HyperbandPruner(min_resource=1, max_resource=table.epochs, reduction_factor=3)
        # its documentation recommends the liar for parallel trials
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=workers > 1)
        name = f"{table.name} {seed}"  # assigns trials to brackets
        self._study = optuna.create_study(sampler=sampler, pruner=pruner, study_name=name)
        self._table, self._trials = table, dict[int, optuna.Trial]()

    def ask(self) -> Piece:
        """Start a trial, which trains to its end unless it is stopped."""
        trial, table = self._study.ask(), self._table
        self._trials[trial.number] = trial
        axes = zip(table.names, table.bounds, table.log, strict=True)
        point = {name: trial.suggest_float(name, low, high, log=bool(log)) for name, (low, high), log in axes}
        return Piece(trial.number, table.epochs, point)

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        """Pass the loss on and let the pruner decide; a diverged trial has failed."""
        assert isinstance(key, int)
        trial = self._trials[key]
        if math.isnan(loss):
            self._study.tell(trial, state=TrialState.FAIL)
            return False
        trial.report(loss, epoch)
        if epoch == self._table.epochs:
            self._study.tell(trial, loss)
        elif trial.should_prune():
            self._study.tell(trial, state=TrialState.PRUNED)
            return False
        return True

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        """Do nothing: the report told the end."""
