"""The published protocol: validation queries against the test archive, in all directions and class by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csmae.config import ConfigError
from csmae.data.archive import Archive, Split
from csmae.encoders import SensorEncoder
from csmae.retrieval.embed import embed
from csmae.retrieval.scores import class_shares, direction_scores, partner_scores, rank_directions
from csmae.sensors import CLASSES

BATCH = 256
"""Scenes that go through the network at once."""


class ClassRow(NamedTuple):
    """How well one class is found."""

    name: str
    num_queries: int
    """Queries that carry it."""
    in_archive: float
    """Allocation of the archive that carries it: what chance would find."""
    shares: list[float]
    """Of each direction, the share of these queries' hits that carry it too; NaN where no query does."""


@dataclass(frozen=True)
class Evaluation:
    """What an encoder scores."""

    num_queries: int
    num_archive: int
    scores: dict[str, float]
    """See ``retrieval_scores``; where a split has no labels, ``partner_scores`` of the test split."""
    classes: list[ClassRow]
    """None where a split has no labels."""
    unlabelled: dict[str, int]
    """By split, the scenes that carry no label: as queries and as hits they count as not found."""

    @property
    def without_labels(self) -> list[str]:
        """Splits in which no scene carries a label."""
        sizes = {"validation": self.num_queries, "test": self.num_archive}
        return [name for name, count in self.unlabelled.items() if count == sizes[name]]


def evaluate(encoder: SensorEncoder, archive: Archive, k: int, advance: Callable[[int], object]) -> Evaluation:
    """Score an encoder (arXiv 2401.07782, section IV).

    Args:
        encoder: On the device that shall compute.
        archive: With the splits ``validation`` and ``test``.
        k: Scenes retrieved for each query.
        advance: Told of scenes as they are embedded.

    Raises:
        ConfigError: K is not between 1 and the intact scenes of the test split.
        ArchiveError: A split is missing, or a pair is damaged.
    """
    queries, gallery = (_embed(encoder, archive.split(name), advance) for name in ("validation", "test"))
    asked, there = queries.labels_nc, gallery.labels_nc
    if not 1 <= k <= len(there) or not len(asked):
        raise ConfigError(f"--k must be between 1 and the {len(there)} scenes of the test split: found {k}")
    unlabelled = {name: int((~labels.any(1)).sum()) for name, labels in (("validation", asked), ("test", there))}
    if not (asked.any() and there.any()):
        return Evaluation(len(asked), len(there), partner_scores(gallery.features), [], unlabelled)
    rankings = rank_directions(queries.features, gallery.features, k)
    shares = [class_shares(asked, there, ranked).tolist() for ranked in rankings.values()]
    counts, chances = asked.sum(0).tolist(), there.float().mean(0).tolist()
    classes = [
        ClassRow(*row) for row in zip(CLASSES, counts, chances, map(list, zip(*shares, strict=True)), strict=True)
    ]
    return Evaluation(len(asked), len(there), direction_scores(rankings, asked, there), classes, unlabelled)


class _Scenes(NamedTuple):
    features: dict[str, Tensor]
    labels_nc: Tensor


def _embed(encoder: SensorEncoder, split: Split, advance: Callable[[int], object]) -> _Scenes:
    """Features and labels of the scenes that are not damaged."""
    features = embed(encoder, split, BATCH, advance)
    labels_nc = torch.from_numpy(split.labels()).to(encoder.device)  # reading them finds damage, too
    rows = np.delete(np.arange(len(split)), split.damaged_rows())
    return _Scenes({sensor: found[rows] for sensor, found in features.items()}, labels_nc[rows])
