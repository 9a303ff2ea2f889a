"""Strategies by the names that a study file uses."""

from __future__ import annotations

from csmae.study.study import Study
from csmae.tuning.early_stopping import make_stopping_rule
from csmae.tuning.strategy.base import Strategy
from csmae.tuning.strategy.rules import RuleStrategy


def make_strategy(study: Study) -> Strategy:
    """Make the strategy of a study.

    It knows no trial yet: ``should_continue`` must be called for every stored score before it decides.
    """
    return RuleStrategy(study.search, make_stopping_rule(study.search, (), study.max_epochs), study.max_epochs)
