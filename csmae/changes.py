"""Values that change during a training: ``train.changes``."""

from __future__ import annotations

from typing import Any

from csmae.config import Config, MayChange, changeable

CHANGEABLE = changeable(MayChange.ON_CHECKPOINT_COPY) - changeable(MayChange.ON_STUDY_RESUME)
"""Dotted names of the fields that can change between two epochs: what is learned depends on them, but not what the network is."""

AFTER_EPOCH = "after_epoch"
"""Key of a change: the complete epochs after which its values hold."""


def config_at(config: Config, epoch: int) -> Config:
    """Return the configuration that holds in the epoch that follows ``epoch`` complete ones; it has no changes."""
    return Config.model_validate(values_at(config, epoch)) if config.train.changes else config


def values_at(config: Config, epoch: int) -> dict[str, Any]:
    """Return the nested values of ``config_at`` without validating them."""
    values = config.model_dump(mode="json")
    values["train"]["changes"] = ()
    for change in config.train.changes:
        if change[AFTER_EPOCH] <= epoch:
            for name in change.keys() - {AFTER_EPOCH}:
                section, _, field = name.partition(".")
                values[section][field] = change[name]
    return values
