"""Our search on a table: the real searcher, trial store, samplers and strategy; only Ray and the training are simulated."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import InMemoryStorage
from pydantic import Field, model_validator

from csmae.config import Config
from csmae.engine_logs import quiet_optuna
from csmae.settings import flatten, validate
from csmae.study.domain import FloatDomain
from csmae.study.options import Search
from csmae.study.space import Space
from csmae.study.study import NESTED_SETTINGS, Study
from csmae.trials.budget import Budget
from csmae.trials.pareto import as_scores
from csmae.trials.store import TrialStore
from csmae.tuning.early_stopping import make_stopping_rule
from csmae.tuning.searcher import METRICS, StudySearcher
from csmae.workers.messages import Outcome
from curves.clock import Ending, Piece
from curves.tables import Table

OBJECTIVE = "val/f1_mean"
"""Name under which the loss of a table is reported: an objective has to be one of the scores that a training reports."""


class TableDomain(FloatDomain):
    """The range of a table's hyperparameter, which is not a field of the configuration."""

    @model_validator(mode="after")
    def _check_field(self) -> TableDomain:
        return self


class TableConfig(Config):
    """A configuration with a table's hyperparameters in place of its own, which stay the same."""

    point: dict[str, float] = Field({})
    """Value of each hyperparameter."""


@dataclass(frozen=True)
class TableStudy(Study):
    """A study whose space has the hyperparameters of a table."""

    config: TableConfig

    def resolve(self, values: Mapping[str, Any]) -> Config:
        """Build the configuration of a point."""
        return self.config.model_copy(update={"point": dict(values)})


def make_study(table: Table, settings: Mapping[str, Any], seed: int, workers: int) -> TableStudy:
    """Make a study that searches a table.

    Args:
        table: Its hyperparameters' ranges are the space.
        settings: Of the section ``search``.
        seed: Of the sampler.
        workers: Trials that train at once.
    """
    base = {"train": {"epochs": table.epochs}, "optim": {"warmup_epochs": 0}}
    config = TableConfig.model_validate(base)
    domains: dict[str, Any] = {
        name: TableDomain.model_validate({"float": list(ends), "log": bool(log)}, context=name)
        for name, ends, log in zip(table.names, table.bounds, table.log, strict=True)
    }
    fixed = {"objectives": {OBJECTIVE: "minimize"}, "num_trials": len(table.points), "start_from": []}
    search = validate(Search, {**fixed, "seed": 1000 * seed, **settings}, NESTED_SETTINGS)
    values = dict(flatten(config.model_dump(mode="json", exclude={"point"})))
    return TableStudy(table.name, base, Space(domains, values), search, config)


def parse_settings(method: str) -> dict[str, Any]:
    """Read the name of one of our methods, ``auto`` or ``SAMPLER+STRATEGY``, with further settings after commas.

    Raises:
        ValueError: The name has another form; one line.
    """
    name, *others = method.split(",")
    settings: dict[str, Any] = dict(item.split("=", 1) for item in others if "=" in item)
    if len(settings) == len(others) and name == "auto":
        return {"sampler": "auto", "strategy": "auto", **settings}
    if len(settings) == len(others) and name.count("+") == 1:
        sampler, strategy = name.split("+")
        return {"sampler": sampler, "strategy": strategy, **settings}
    raise ValueError(f"--methods: must be auto or SAMPLER+STRATEGY, such as tpe+asha,grace_epochs=3: found {method!r}")


class Ours:
    """Plays Ray Tune's part towards ``StudySearcher``.

    Args:
        table: To search.
        settings: Of the section ``search``.
        seed: Of the sampler.
        workers: Trials that train at once.
        folder: For the trial store.
        database: Whether the trial store has its database, which takes most of the time, or is kept in memory.
    """

    def __init__(
        self,
        table: Table,
        settings: Mapping[str, Any],
        seed: int,
        workers: int,
        folder: Path,
        database: bool = False,
    ) -> None:
        study = make_study(table, settings, seed, workers)
        self._signs, self._epochs = study.search.signs, table.epochs
        quiet_optuna()
        trial_store = TrialStore(study, folder, backend=None if database else InMemoryStorage())
        self._searcher = StudySearcher(Budget(trial_store), lambda event: None, lambda: workers)
        self._rule = make_stopping_rule(study.search, (), table.epochs)
        self._ids: dict[Hashable, str] = {}
        """By the number of a running trial: Tune's name of its present piece."""
        self._num_pieces = 0

    def ask(self) -> Piece | None:
        """Ask the searcher, as Tune does for each free worker."""
        self._num_pieces += 1
        tune_id = str(self._num_pieces)
        suggestion = self._searcher.suggest(tune_id)
        if not isinstance(suggestion, dict):
            return None
        number = suggestion["number"]
        self._ids[number] = tune_id
        return Piece(number, self._epochs, suggestion["config"]["point"])

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        """Report an epoch as a trainable does, and decide as the scheduler does. A diverged training reports none."""
        if math.isnan(loss):
            return False
        self._searcher.on_trial_result(self._ids[key], {"epoch": epoch, METRICS + OBJECTIVE: loss})
        assert isinstance(key, int)
        return self._rule is None or self._rule.should_continue(key, epoch, as_scores((loss,), self._signs))

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        """Report how the piece ended."""
        outcomes: dict[Ending, dict[str, Any]] = {
            Ending.FINISHED: {Outcome.FINISHED: True},
            Ending.DIVERGED: {Outcome.FAILED: f"the loss is not finite in epoch {epoch}"},
        }
        self._searcher.on_trial_complete(self._ids.pop(key), outcomes.get(ending, {}))
