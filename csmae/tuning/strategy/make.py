"""Strategies by the names that a study file uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from csmae.config import ConfigError
from csmae.model.cost import cost
from csmae.study.study import Study
from csmae.study.values import Value
from csmae.tuning.early_stopping import make_stopping_rule
from csmae.tuning.strategy.auto import AutoStrategy
from csmae.tuning.strategy.base import Strategy
from csmae.tuning.strategy.pbt import PopulationBased
from csmae.tuning.strategy.rules import RuleStrategy


def make_strategy(study: Study) -> Strategy:
    """Make the strategy of a study.

    It knows no trial yet: ``should_continue`` must be called for every stored score before it decides.
    """
    if study.search.strategy == "auto":
        return AutoStrategy(study, _epoch_cost(study))
    if study.search.strategy == "pbt":
        return PopulationBased(study)
    return RuleStrategy(study.search, make_stopping_rule(study.search, (), study.max_epochs), study.max_epochs)


def _epoch_cost(study: Study) -> Callable[[Mapping[str, Value]], float | None]:
    """The cost of an epoch of a point in relation to the base's, by FLOPs; None for a point that is invalid."""
    base = cost(study.resolve({})).flops

    def epoch_cost(point: Mapping[str, Value]) -> float | None:
        try:
            return cost(study.resolve(point)).flops / base
        except ConfigError:
            return None

    return epoch_cost
