"""Optuna's samplers by the names that a study file uses."""

from __future__ import annotations

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from csmae.tuning.options import Search


def make_sampler(search: Search, num_trials: int) -> BaseSampler:
    """The sampler that a study asks for, as it draws after so many trials.

    Seeding by the number of trials makes a restarted search propose what an uninterrupted one would. A grid's points
    are put in line, so that any sampler does.
    """
    seed, startup = search.seed + num_trials, search.startup_trials
    if search.sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
    if search.sampler == "gp":
        return GPSampler(seed=seed, n_startup_trials=startup)
    if search.sampler == "nsga2":
        return NSGAIISampler(seed=seed)
    if search.sampler == "qmc":  # counts its points in the database, and their order needs one seed
        return QMCSampler(seed=search.seed, scramble=True, independent_sampler=RandomSampler(seed=seed))
    return RandomSampler(seed=seed)
