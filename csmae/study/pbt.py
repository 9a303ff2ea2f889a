"""The settings of population based training, and what a study must be like for it."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from csmae.changes import CHANGEABLE
from csmae.config import ConfigError, MayChange, Section

if TYPE_CHECKING:
    from csmae.study.study import Study


class Pbt(Section):
    """Population based training: copies of the best trials replace the worst ones."""

    may_change: ClassVar[MayChange] = MayChange.ON_STUDY_RESUME

    interval: int | None = Field(None, ge=1)
    """Epochs that a trial trains before it pauses and is compared, rounded up to a multiple of ``eval.every``; null is a tenth
    of ``train.epochs``."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of the population that is replaced at a pause, and share whose members are copied; at least one trial each."""


def pbt_interval(study: Study) -> int:
    """Epochs between two pauses: ``pbt.interval``, or a tenth of the training, rounded up to epochs that are scored."""
    every = int(study.space.base["eval.every"])
    return math.ceil((study.search.pbt.interval or study.max_epochs / 10) / every) * every


def check_pbt(study: Study) -> None:
    """Check that the population has several members, which pause, and that all values may change in the training.

    Raises:
        ConfigError: They may not.
    """
    search, interval, where = study.search, pbt_interval(study), "search.strategy pbt"
    if search.num_trials < 2:
        raise ConfigError(f"{where} replaces trials by copies of others: search.num_trials must be at least 2, found 1")
    if interval >= study.max_epochs:
        raise ConfigError(
            f"search.pbt.interval, a multiple of eval.every, must be smaller than train.epochs {study.max_epochs}: found {interval}"
        )
    if study.space.base["train.changes"]:
        raise ConfigError(f"{where} changes values during the training itself: remove train.changes from the base")
    if search.disk_limit:
        raise ConfigError(f"{where} needs the checkpoints of all {search.num_trials} trials: remove search.disk_limit")
    for name in study.space.domains:
        if name not in CHANGEABLE:
            raise ConfigError(
                f"{where} changes values during the training, and {name} cannot change then: set it in 'base', or use another strategy"
            )
    _check_weights(study)


def _check_weights(study: Study) -> None:
    """Reject a space in which a loss weight decides which parts the network has."""
    weights = [name for name in study.space.domains if name.startswith("loss.") and name.endswith("_weight")]
    parts = None
    for values in product(*([0, 1] if 0 in study.space.domains[name] else [1] for name in weights)):
        try:
            loss = study.resolve(dict(zip(weights, values, strict=True))).loss
        except ConfigError:
            continue  # a combination that is never trained
        if parts not in (None, loss.parts):
            zero = next(name for name in weights if 0 in study.space.domains[name])
            raise ConfigError(
                f"search.strategy pbt: {zero} may be 0 or more, and the network differs between the two: let it be above 0 in the "
                "space, or set it in 'base'"
            )
        parts = loss.parts
