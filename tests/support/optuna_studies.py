"""Studies of Optuna in memory, with trials as a search records them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from csmae.engine_logs import quiet_optuna
from csmae.study.values import encode_value
from csmae.tracking.tracker import Direction
from csmae.trials.attributes import NUM_EPOCHS

OBJECTIVE = "val/f1_mean"


def empty_study(direction: Direction = "maximize", storage: optuna.storages.BaseStorage | None = None) -> optuna.Study:
    quiet_optuna()
    study = optuna.create_study(study_name="masking", direction=direction, storage=storage)
    study.set_metric_names([OBJECTIVE])
    return study


def add_trial(
    study: optuna.Study,
    value: float,
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution] | None = None,
    state: TrialState | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Add a trial of two epochs; NaN is a failed one. Parameters are numbers from 0 to 10 unless ``distributions`` has them."""
    failed = math.isnan(value)
    if state is None:  # RUNNING is 0
        state = TrialState.FAIL if failed else TrialState.COMPLETE
    numbers: dict[str, BaseDistribution] = {name: FloatDistribution(0, 10) for name in params}
    study.add_trial(
        optuna.create_trial(
            state=state,
            value=value if state is TrialState.COMPLETE else None,
            params=dict(params),
            distributions=numbers | dict(distributions or {}),
            intermediate_values={} if failed else {1: value / 2, 2: value},
            user_attrs={NUM_EPOCHS: 2, **(attributes or {})},
        )
    )


def study_of(values: list[float], direction: Direction = "maximize", **params: list[Any]) -> optuna.Study:
    """A study with a trial for each value.

    Args:
        values: Of the objective; NaN is a failed trial.
        direction: ``maximize`` or ``minimize``.
        **params: The trials' parameters by name, with ``__`` for the dot.
    """
    study = empty_study(direction)
    columns = {name.replace("__", "."): [encode_value(param) for param in column] for name, column in params.items()}
    distributions = {name: CategoricalDistribution(list(dict.fromkeys(column))) for name, column in columns.items()}
    for number, value in enumerate(values):
        add_trial(study, value, {name: column[number] for name, column in columns.items()}, distributions)
    return study
