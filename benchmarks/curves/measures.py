"""What runs on tables are measured by: speed-up over random search, regret, time per decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from curves.clock import BUDGET, Run
from curves.tables import Floats, Table

CHECKPOINTS = (3, 10, 30)
"""Budgets at which the regret is measured, in complete trainings."""

NUM_RANDOM = 1000
"""Random searches per table, whose mean is the reference."""

NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def time_to_best(table: Table, run: Run) -> float:
    """Epochs until a configuration of the best 1 % was fully trained; the budget if none was."""
    hit = (float(spent) for spent, rank in run.improvements if rank < table.num_best)
    return next(hit, float(BUDGET * table.epochs))


def reached(table: Table, run: Run) -> bool:
    """Whether a configuration of the best 1 % was fully trained."""
    return any(rank < table.num_best for _, rank in run.improvements)


def regret(table: Table, run: Run, trainings: float) -> float:
    """Normalized regret of the best fully trained configuration; 1 as long as there is none.

    Args:
        table: Searched by the run.
        run: The search.
        trainings: Budget, in complete trainings.
    """
    ranks = [rank for spent, rank in run.improvements if spent <= trainings * table.epochs]
    return float(table.regrets[min(ranks)]) if ranks else 1.0


def regret_curve(table: Table, runs: Sequence[Run], trainings: Floats) -> Floats:
    """Mean regret of some runs at each budget, in complete trainings."""
    regrets = np.array([[regret(table, run, budget) for budget in trainings] for run in runs])
    return np.asarray(regrets.mean(axis=0))


def speed_ups(times: Mapping[str, Sequence[float]], random_times: Mapping[str, float]) -> dict[str, float]:
    """By table: mean epochs of random search over mean epochs of the method, both censored at the budget."""
    return {name: random_times[name] / float(np.mean(values)) for name, values in times.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers."""
    return math.exp(float(np.mean(np.log(values))))


def speed_up(times: Mapping[str, Sequence[float]], random_times: Mapping[str, float], tables: bool = True) -> Interval:
    """Geometric mean of the speed-ups over the tables.

    Args:
        times: By table, epochs to the best 1 % of each seed.
        random_times: By table, the mean of random search. Its own error is below 1 % and left out.
        tables: Whether the interval spans other tables of the same kind, or only other seeds on these tables.

    Returns:
        The estimate, and the percentile interval of a bootstrap that resamples the seeds within each table, and the tables.
    """
    random, names = np.random.default_rng(0), list(times)
    samples = [_resampled_means(np.array(times[name]), random) for name in names]
    logs = np.array([np.log(random_times[name] / means) for name, means in zip(names, samples, strict=True)])
    if tables:
        chosen = random.integers(len(names), size=logs.shape)
        logs = np.take_along_axis(logs, chosen, axis=0)
    low, high = np.exp(np.percentile(logs.mean(axis=0), [2.5, 97.5]))
    value = geometric_mean(list(speed_ups(times, random_times).values()))
    return Interval(value, float(low), float(high))


def _resampled_means(values: Floats, random: np.random.Generator) -> Floats:
    chosen = random.integers(len(values), size=(NUM_RESAMPLES, len(values)))
    return np.asarray(values[chosen].mean(axis=1))
