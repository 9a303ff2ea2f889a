"""The pairs that a run trains and is scored on."""

from __future__ import annotations

import numpy as np

from csmae.config import Config, ConfigError
from csmae.data.archive import Archive, open_archive
from csmae.data.split import Split

VALIDATION_SEED = 0
"""Seed of the validation pairs and their order: the same for every trial, otherwise scores would not compare."""


def validate_run(config: Config, world_size: int = 1) -> Archive:
    """Check that a configuration can be trained and scored on its archive.

    Returns:
        The archive, opened.

    Raises:
        ConfigError: The archive cannot be opened, a split is too small, or the workers cannot share the batch evenly.
    """
    archive = open_archive(config.data)
    batch, k = config.optim.batch_size, config.eval.k
    if batch % world_size:
        raise ConfigError(
            f"optim.batch_size must be a multiple of the workers of a trial: {batch} pairs on {world_size} workers"
        )
    sizes = {name: len(archive.split(name)) for name in ("train", "validation", "test")}
    train = min(sizes["train"], config.data.max_train_pairs or sizes["train"])
    if batch > train:
        raise ConfigError(
            f"optim.batch_size {batch} is larger than the training split: {train} pairs in {config.data.path}"
        )
    half = min(sizes["validation"], config.eval.max_pairs or sizes["validation"]) // 2
    for name, size in (("half of the validation split", half), ("the test split", sizes["test"])):
        if size < k:
            raise ConfigError(
                f"eval.k {k} needs as many scenes to retrieve from: {name} of {config.data.path} has {size}"
            )
    return archive


def train_split(archive: Archive, config: Config) -> Split:
    """The pairs to train on: ``data.max_train_pairs`` random ones, or all."""
    return _random_subset(archive.split("train"), config.data.max_train_pairs, config.train.seed)


def validation_split(archive: Archive, config: Config) -> Split:
    """The validation pairs that every epoch is scored on, in random order."""
    split = archive.split("validation")
    return _random_subset(split, config.eval.max_pairs or len(split), VALIDATION_SEED)


def _random_subset(split: Split, max_pairs: int | None, seed: int) -> Split:
    """At most ``max_pairs`` random pairs in random order; the unchanged split if it is None."""
    if max_pairs is None:
        return split
    return split.take(np.random.default_rng(seed).permutation(len(split))[:max_pairs])
