"""Optuna's samplers by the names that a study file uses."""

from __future__ import annotations

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from csmae.study.options import Search

NUM_GENERATIONS = 5
"""Generations that nsga2 has within a study, at least: Optuna's own populations of 50 would leave most studies at random."""

MIN_POPULATION, MAX_POPULATION = 4, 50


def make_sampler(search: Search, num_trials: int) -> BaseSampler:
    """The sampler that a study asks for, as it draws after so many trials.

    Seeding by the number of trials makes a restarted search propose what an uninterrupted one would. A grid's points
    are put in line, so that any sampler does.
    """
    seed, startup = search.seed + num_trials, search.startup_trials
    if search.sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
    if search.sampler == "gp":  # what it draws at random is said when the search begins
        return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    if search.sampler == "nsga2":
        return NSGAIISampler(seed=seed, population_size=population_size(search))
    if search.sampler == "qmc":  # counts its points in the database, and their order needs one seed
        independent = RandomSampler(seed=seed)
        return QMCSampler(
            seed=search.seed, scramble=True, independent_sampler=independent, warn_independent_sampling=False
        )
    return RandomSampler(seed=seed)


def population_size(search: Search) -> int:
    """Trials of a generation of nsga2, which counts those trained to their end."""
    return min(MAX_POPULATION, max(MIN_POPULATION, num_complete(search) // NUM_GENERATIONS))


def num_complete(search: Search) -> int:
    """About how many of a study's trials are trained to their end: early stopping leaves one of ``reduction``."""
    return search.num_trials // (search.reduction if search.scheduler in ("asha", "hyperband") else 1)
