"""Warnings about search settings that cannot do what their names suggest."""

from __future__ import annotations

from collections.abc import Iterator

from csmae.study.options import Search
from csmae.study.study import Study
from csmae.tuning.early_stopping import bracket_weights, grace_epochs
from csmae.tuning.samplers import num_complete, population_size
from csmae.tuning.stop_when import terminator_warnings

UNCONDITIONAL = ("gp", "nsga2", "qmc")
"""Optuna's samplers that model only parameters that every trial has."""


def settings_warnings(study: Study) -> Iterator[str]:
    """Yield a line for each sampler that draws at random and each strategy that stops no trial."""
    search, space = study.search, study.space
    conditional = ", ".join(name for name, domain in space.domains.items() if domain.when)
    if search.sampler in UNCONDITIONAL and conditional:
        yield f"search.sampler {search.sampler} draws {conditional} at random: only tpe models conditional parameters"
    if search.sampler in ("auto", "tpe", "gp") and search.startup_trials >= search.num_trials > 1:
        yield (
            f"search.startup_trials {search.startup_trials}: all {search.num_trials} trials are drawn at random, "
            f"and the sampler {search.sampler} learns nothing"
        )
    if search.sampler == "gp" and search.strategy != "none":
        yield "search.sampler gp learns nothing from trials that are stopped early: tpe does"
    if search.sampler == "nsga2":
        yield _generations_warning(search)
    yield from _strategy_warnings(search, study.max_epochs, space.base["eval.every"])
    yield from terminator_warnings(study)


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


def _strategy_warnings(search: Search, epochs: int, eval_every: int) -> Iterator[str]:
    if search.strategy in ("none", "pbt") or epochs == 1:
        return
    grace, last_judged = grace_epochs(search), (epochs - 1) // eval_every * eval_every
    if search.strategy == "hyperband":
        weights = bracket_weights(epochs, grace, search.reduction)
        if len(weights) == 1 or last_judged < round(epochs / search.reduction ** (len(weights) - 1)):
            yield (
                f"search.strategy hyperband stops no trial: between search.grace_epochs {grace} and train.epochs {epochs} "
                f"there is no epoch at which it can, with search.reduction {search.reduction} and eval.every {eval_every}"
            )
        elif search.num_trials < sum(weights):
            yield (
                f"search.strategy hyperband needs {sum(weights)} trials for one round of its {len(weights)} brackets: "
                f"with {search.num_trials}, the trials of a bracket compare with few others, and asha stops more of them"
            )
    elif last_judged < grace:
        yield (
            f"search.strategy {search.strategy} stops no trial: with search.grace_epochs {grace} and "
            f"eval.every {eval_every} no trial is judged before its last epoch, {epochs}"
        )
