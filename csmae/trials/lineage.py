"""Lineages: a copy continues the training of its parent, which may be a copy itself, with other values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from csmae.changes import AFTER_EPOCH
from csmae.study.space import Space
from csmae.study.values import Value
from csmae.trials.attributes import LINEAGE, PARENT
from csmae.trials.trial import params_of, parent_number, with_seed


def copy_attributes(parent: FrozenTrial, epoch: int, values: Mapping[str, Value], space: Space) -> dict[str, Any]:
    """Attributes of a trial that copies another one's checkpoint.

    Args:
        parent: The other trial.
        epoch: Complete epochs of the checkpoint.
        values: The copy's point.
        space: The study's; a field that a point lacks has the base's value.
    """
    before = params_of(parent)
    lineage = parent.user_attrs.get(LINEAGE, {"point": before, "changes": []})
    old, new = ({name: point.get(name, space.base[name]) for name in space.domains} for point in (before, values))
    change = {AFTER_EPOCH: epoch, **{name: value for name, value in new.items() if old[name] != value}}
    return {PARENT: parent.number, LINEAGE: {**lineage, "changes": [*lineage["changes"], change]}}


def trained_values(trial: optuna.Trial | FrozenTrial, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by which a trial is trained from its first epoch on.

    Args:
        trial: If it is a copy, or confirms one, the values are those of the first trial of its lineage, with
            ``train.changes``.
        values: Its point.
    """
    lineage = trial.user_attrs.get(LINEAGE)
    return with_seed(trial, {**lineage["point"], "train.changes": lineage["changes"]} if lineage else values)


def describe_copy(trial: FrozenTrial) -> str:
    """Say of which trial a trial is a copy, such as ``copy of 3 at epoch 4``; empty for any other trial."""
    parent = parent_number(trial)
    return (
        "" if parent is None else f"copy of {parent} at epoch {trial.user_attrs[LINEAGE]['changes'][-1][AFTER_EPOCH]}"
    )
