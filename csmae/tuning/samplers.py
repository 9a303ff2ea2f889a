"""Optuna's samplers by the names that a study file uses."""

from __future__ import annotations

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from csmae.study.options import Search

NUM_GENERATIONS = 5
"""Minimum number of nsga2's generations in a study: with Optuna's population of 50, most studies would stay random."""

MIN_POPULATION, MAX_POPULATION = 4, 50


def make_sampler(search: Search, num_trials: int) -> BaseSampler:
    """Make the sampler of a search.

    Args:
        search: Names the sampler. A grid uses it only to fill the missing values of enqueued points.
        num_trials: Trials and rejections so far. They seed the sampler, so a restarted search proposes the same points as an
            uninterrupted one.
    """
    seed, startup = search.seed + num_trials, search.startup_trials
    if search.sampler in ("auto", "tpe"):
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
    if search.sampler == "gp":  # settings_warnings() names the parameters that it draws at random
        return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    if search.sampler == "nsga2":
        return NSGAIISampler(seed=seed, population_size=population_size(search))
    if search.sampler == "qmc":  # it counts its points in the database; their sequence needs a constant seed
        independent = RandomSampler(seed=seed)
        return QMCSampler(
            seed=search.seed, scramble=True, independent_sampler=independent, warn_independent_sampling=False
        )
    return RandomSampler(seed=seed)


def population_size(search: Search) -> int:
    """Number of complete trials in a generation of nsga2."""
    return min(MAX_POPULATION, max(MIN_POPULATION, num_complete(search) // NUM_GENERATIONS))


def num_complete(search: Search) -> int:
    """Estimated number of trials that early stopping does not stop: one of ``reduction``."""
    return search.num_trials // (search.reduction if search.strategy in ("asha", "hyperband") else 1)
