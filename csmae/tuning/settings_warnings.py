"""What a search's settings cannot do here, said before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from csmae.study.options import Search
from csmae.study.study import Study
from csmae.tuning.early_stopping import num_brackets
from csmae.tuning.samplers import num_complete, population_size

UNCONDITIONAL = ("gp", "nsga2", "qmc")
"""Samplers of Optuna that model only the parameters that every trial has."""


def settings_warnings(study: Study) -> Iterator[str]:
    """Lines about samplers that draw at random and schedulers that stop nothing, other than their names suggest."""
    search, space = study.search, study.space
    conditional = ", ".join(name for name, domain in space.domains.items() if domain.when)
    if search.sampler in UNCONDITIONAL and conditional:
        yield f"search.sampler {search.sampler} draws {conditional} at random: of the samplers tpe alone models conditions"
    if search.sampler in ("tpe", "gp") and search.startup_trials >= search.num_trials > 1:
        yield (
            f"search.startup_trials {search.startup_trials}: all {search.num_trials} trials are drawn at random, "
            f"and {search.sampler} learns nothing"
        )
    if search.sampler == "gp" and search.scheduler != "none":
        yield "search.sampler gp learns nothing from trials that are stopped early: tpe does"
    if search.sampler == "nsga2":
        yield _generations(search)
    yield from _stopping(search, study.longest, space.base["eval.every"])


def _generations(search: Search) -> str:
    size, complete = population_size(search), num_complete(search)
    ended = "" if complete == search.num_trials else f", of which early stopping leaves about {complete}"
    if complete < 2 * size:
        return f"search.sampler nsga2 is random search here: it takes two generations of {size} trials trained to their end{ended}"
    return f"search.sampler nsga2 learns from generations of {size} trials trained to their end{ended}; the first is drawn at random"


def _stopping(search: Search, epochs: int, every: int) -> Iterator[str]:
    if search.scheduler == "none" or epochs == 1:
        return
    if (epochs - 1) // every * every < search.grace_epochs:
        yield (
            f"search.scheduler {search.scheduler} stops no trial: with search.grace_epochs {search.grace_epochs} and "
            f"eval.every {every} none is judged before its last epoch, {epochs}"
        )
    elif search.scheduler == "hyperband" and num_brackets(search, epochs) == 1:
        yield (
            f"search.scheduler hyperband is asha here: search.grace_epochs {search.grace_epochs} times "
            f"search.reduction {search.reduction} is not less than train.epochs, {epochs}"
        )
