"""The published retrieval protocol: validation queries against the test archive, in all directions and by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from csmae.config import ConfigError
from csmae.data.archive import Archive
from csmae.data.split import Split
from csmae.encoders import SensorEncoder
from csmae.retrieval.embed import BATCH_SIZE, embed
from csmae.retrieval.scores import LabeledScenes, class_hit_rates, direction_scores, partner_scores, rank_directions
from csmae.sensors import CLASSES


class ClassRow(NamedTuple):
    """Retrieval of one class."""

    name: str
    num_queries: int
    """Queries that have the class."""
    archive_fraction: float
    """Fraction of the archive that has the class: the hit rate of random retrieval."""
    hit_rates: list[float]
    """By direction, the fraction of these queries' hits that has the class too; NaN without such queries."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of an encoder."""

    num_queries: int
    num_archive: int
    scores: dict[str, float]
    """See ``direction_scores``; if a split has no labels, ``partner_scores`` of the test split."""
    classes: list[ClassRow]
    """Empty if a split has no labels."""
    unlabeled: dict[str, int]
    """By split, the number of scenes without labels: as queries and as hits they count as not found."""

    @property
    def splits_without_labels(self) -> list[str]:
        """Splits in which no scene has a label."""
        sizes = {"validation": self.num_queries, "test": self.num_archive}
        return [name for name, count in self.unlabeled.items() if count == sizes[name]]


def evaluate(
    encoder: SensorEncoder,
    archive: Archive,
    k: int,
    advance: Callable[[int], object] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """Score an encoder (arXiv 2401.07782, section IV). Damaged scenes are neither queries nor hits.

    Args:
        encoder: On the device that computes.
        archive: With the splits ``validation`` and ``test``.
        k: Scenes retrieved per query.
        advance: Called with the number of scenes of each embedded batch.
        batch_size: Pairs per batch of the encoder.

    Raises:
        ConfigError: k is not between 1 and the number of intact scenes of the test split, or no query is intact.
        ArchiveError: A split is missing, or a pair is damaged and the archive does not skip damaged pairs.
    """
    queries, gallery = (
        _intact_scenes(encoder, archive.split(name), batch_size, advance) for name in ("validation", "test")
    )
    query_labels_qc, archive_labels_nc = queries.labels_nc, gallery.labels_nc
    num_queries, num_archive = len(query_labels_qc), len(archive_labels_nc)
    if not num_queries:
        raise ConfigError("the validation split has no intact scene to query with")
    if not 1 <= k <= num_archive:
        raise ConfigError(f"k must be between 1 and the {num_archive} intact scenes of the test split: found {k}")
    labels = {"validation": query_labels_qc, "test": archive_labels_nc}
    unlabeled = {name: int((~labels_nc.any(1)).sum()) for name, labels_nc in labels.items()}
    if not (query_labels_qc.any() and archive_labels_nc.any()):
        return Evaluation(num_queries, num_archive, partner_scores(gallery.features), [], unlabeled)
    rankings = rank_directions(queries.features, gallery.features, k)
    scores = direction_scores(rankings, query_labels_qc, archive_labels_nc)
    rates = [class_hit_rates(query_labels_qc, archive_labels_nc, ranked).tolist() for ranked in rankings.values()]
    columns = (
        query_labels_qc.sum(0).tolist(),
        archive_labels_nc.float().mean(0).tolist(),
        map(list, zip(*rates, strict=True)),
    )
    classes = [ClassRow(*row) for row in zip(CLASSES, *columns, strict=True)]
    return Evaluation(num_queries, num_archive, scores, classes, unlabeled)


def _intact_scenes(
    encoder: SensorEncoder, split: Split, batch_size: int, advance: Callable[[int], object] | None
) -> LabeledScenes:
    labels_nc = torch.from_numpy(split.labels()).to(encoder.device)  # before embedding: it may find damaged values too
    return LabeledScenes(embed(encoder, split, batch_size, advance), labels_nc).intact()
