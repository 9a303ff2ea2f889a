"""Priors under the default strategy: a good one finds good trials earlier, a wrong one costs little."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from csmae.study.space import Space
from csmae.study.study import Study
from csmae.tuning.strategy.base import NewTrial
from tests.tuning.strategy.test_auto import DOMAINS, Simulation, make_study, quality

GOOD: dict[str, Any] = {"masking.ratio": 0.65, "loss.mim_weight": 1.4}

WRONG: dict[str, Any] = {"masking.ratio": 0.15, "loss.mim_weight": 3.8}

BUDGET = 60
"""Epochs: less than three complete trainings."""


def study_with(centers: dict[str, Any], seed: int = 0) -> Study:
    study = make_study(seed=seed)
    priors = {name: {"prior": {"center": center, "confidence": "high"}} for name, center in centers.items()}
    entries = {name: DOMAINS[name] | priors.get(name, {}) for name in study.space.domains}
    return replace(study, space=Space.parse(entries, study.space.base))


def regret(centers: dict[str, Any], seed: int) -> list[float]:
    """By how much the best trial so far falls short of the optimum, for each epoch of a small budget."""
    simulation, best, regrets = Simulation(study_with(centers, seed)), 0.0, []
    while simulation.epochs < BUDGET:
        before = simulation.epochs
        assert simulation.step()
        regrets += [1 - best] * (simulation.epochs - before)
        best = max(best, *(quality(trial.point) for trial in simulation.trials))
    return regrets[:BUDGET]


def test_a_good_prior_finds_good_trials_earlier_and_a_wrong_one_costs_little() -> None:
    none, good, wrong = (np.mean([regret(centers, seed) for seed in range(6)], axis=0) for centers in ({}, GOOD, WRONG))
    assert good.mean() < 0.6 * none.mean()
    assert wrong[-1] < none[-1] + 0.1


@pytest.mark.parametrize("centers", [GOOD, WRONG])
def test_the_centers_come_first_and_half_of_the_candidates_are_uniform(centers: dict[str, Any]) -> None:
    simulation = Simulation(study_with(centers))
    assert simulation.step()
    assert simulation.trials[0].point == simulation.study.space.prior_center()
    assert simulation.decisions[0].reason == "the centers of the priors"
    assert simulation.step()
    decision = simulation.strategy.next([], 60)
    assert isinstance(decision, NewTrial) and decision.points is not None
    low, high = np.quantile([point["masking.ratio"] for point in decision.points], (0.05, 0.95))
    assert low < 0.25 and high > 0.75  # a standard deviation of the prior is 0.1
