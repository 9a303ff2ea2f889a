"""Warnings about search settings that cannot do what their names suggest."""

from __future__ import annotations

from collections.abc import Iterator

from csmae.study.options import Search
from csmae.study.study import Study
from csmae.tuning.early_stopping import num_brackets
from csmae.tuning.samplers import num_complete, population_size

UNCONDITIONAL = ("gp", "nsga2", "qmc")
"""Optuna's samplers that model only parameters that every trial has."""


def settings_warnings(study: Study) -> Iterator[str]:
    """Yield a line for each sampler that draws at random and each strategy that stops no trial."""
    search, space = study.search, study.space
    conditional = ", ".join(name for name, domain in space.domains.items() if domain.when)
    if search.sampler in UNCONDITIONAL and conditional:
        yield f"search.sampler {search.sampler} draws {conditional} at random: only tpe models conditional parameters"
    if search.sampler in ("tpe", "gp") and search.startup_trials >= search.num_trials > 1:
        yield (
            f"search.startup_trials {search.startup_trials}: all {search.num_trials} trials are drawn at random, "
            f"and {search.sampler} learns nothing"
        )
    if search.sampler == "gp" and search.strategy != "none":
        yield "search.sampler gp learns nothing from trials that are stopped early: tpe does"
    if search.sampler == "nsga2":
        yield _generations_warning(search)
    yield from _scheduler_warnings(search, study.max_epochs, space.base["eval.every"])


def _generations_warning(search: Search) -> str:
    size, complete = population_size(search), num_complete(search)
    left = "" if complete == search.num_trials else f", of which early stopping leaves about {complete}"
    if complete < 2 * size:
        return (
            f"search.sampler nsga2 is random search here: it needs two generations of {size} trials that complete{left}"
        )
    return (
        f"search.sampler nsga2 learns from generations of {size} trials that complete{left}; "
        "the first generation is drawn at random"
    )


def _scheduler_warnings(search: Search, epochs: int, eval_every: int) -> Iterator[str]:
    if search.strategy == "none" or epochs == 1:
        return
    if (epochs - 1) // eval_every * eval_every < search.grace_epochs:
        yield (
            f"search.strategy {search.strategy} stops no trial: with search.grace_epochs {search.grace_epochs} and "
            f"eval.every {eval_every} no trial is judged before its last epoch, {epochs}"
        )
    elif search.strategy == "hyperband" and num_brackets(search, epochs) == 1:
        yield (
            f"search.strategy hyperband is asha here: search.grace_epochs {search.grace_epochs} times "
            f"search.reduction {search.reduction} is not less than train.epochs, {epochs}"
        )
