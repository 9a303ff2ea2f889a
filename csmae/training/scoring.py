"""Scores of an encoder: each epoch within the validation split, and by the published protocol at the end."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csmae.config import Config, ConfigError
from csmae.data.archive import Archive, Split, open_archive
from csmae.encoders import SensorEncoder
from csmae.model.csmae import CSMAE
from csmae.retrieval.embed import embed
from csmae.retrieval.scores import partner_scores, retrieval_scores

SUBSET_SEED = 0
"""Draws the validation pairs and their halves: the same for every trial, or scores would not compare."""


def validation_split(archive: Archive, config: Config) -> Split:
    """The validation pairs that every epoch is scored on, in an order whose halves are a fair draw."""
    split = archive.split("validation")
    return subset(split, config.eval.max_pairs or len(split), SUBSET_SEED)


def subset(split: Split, max_pairs: int | None, seed: int) -> Split:
    """At most ``max_pairs`` pairs, drawn at random; the split as it is where None."""
    if max_pairs is None:
        return split
    return split.take(np.random.default_rng(seed).permutation(len(split))[:max_pairs])


def validation_scores(features: dict[str, Tensor], validation: Split, k: int) -> dict[str, float]:
    """Retrieval within the validation split: its first half queries its second.

    Args:
        features: Of the split's scenes, as ``embed`` gives them.
        validation: Has their labels.
        k: Scenes retrieved for each query.

    Returns:
        ``val/f1_mean``, ``val/f1/s1_to_s2`` and the like (see ``retrieval_scores``) where there are labels, and
        over the whole split ``val/recall_at_1`` and ``val/mrr`` (see ``partner_scores``).
    """
    scenes, half = _Scenes.of(features, validation), len(validation) // 2
    queries, archive = scenes.intact(slice(half)), scenes.intact(slice(half, None))
    scores = _label_scores(queries, archive, k) | partner_scores(scenes.intact(slice(None)).features)
    return {f"val/{name}": value for name, value in scores.items()}


def score(config: Config, encoder_dir: Path | None = None, device: str | None = None) -> dict[str, float]:
    """Score an encoder by the published protocol: validation queries, test archive (arXiv 2401.07782, section IV).

    Args:
        config: Names the archive and k.
        encoder_dir: An encoder folder; the untrained encoder of the configuration where None.
        device: Such as ``cuda:0``; the process's GPU, or the CPU, where None.

    Returns:
        ``test/f1_mean``, ``test/f1/s1_to_s2`` and the like, see ``retrieval_scores``; for an archive without
        labels ``test/recall_at_1`` and ``test/mrr`` within the test split, see ``partner_scores``.
    """
    archive = open_archive(config.data)
    encoder = SensorEncoder.load(encoder_dir) if encoder_dir else encoder_of(seeded_model(config), config)
    encoder.to(torch.device(device or default_device())).eval()
    queries, gallery = (
        _Scenes.of(embed(encoder, split, config.eval.batch_size), split).intact(slice(None))
        for split in map(archive.split, ("validation", "test"))
    )
    scores = _label_scores(queries, gallery, config.eval.k) or partner_scores(gallery.features)
    return {f"test/{name}": value for name, value in scores.items()}


class _Scenes(NamedTuple):
    features: dict[str, Tensor]
    labels_nc: Tensor

    @classmethod
    def of(cls, features: dict[str, Tensor], split: Split) -> _Scenes:
        return cls(features, torch.from_numpy(split.labels()).to(features["s1"].device))

    def intact(self, part: slice) -> _Scenes:
        """Those of a part that are not damaged: where damage is skipped, features are zero."""
        rows = self.features["s1"][part].any(dim=1)
        features = {sensor: found[part][rows] for sensor, found in self.features.items()}
        return _Scenes(features, self.labels_nc[part][rows])


def _label_scores(queries: _Scenes, archive: _Scenes, k: int) -> dict[str, float]:
    """Scores by labels; none where the archive has no labels."""
    num_queries, num_scenes = len(queries.labels_nc), len(archive.labels_nc)
    if num_queries == 0 or num_scenes < k:
        raise ConfigError(
            f"eval.k {k} needs a query and as many scenes to retrieve from: without the damaged pairs there are"
            f" {num_queries} and {num_scenes}"
        )
    if not (queries.labels_nc.any() and archive.labels_nc.any()):
        return {}
    return retrieval_scores(*queries, *archive, k)


def seeded_model(config: Config) -> CSMAE:
    """The network with which a run of this configuration starts; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return CSMAE(config.model, config.masking, config.loss)


def encoder_of(model: CSMAE, config: Config) -> SensorEncoder:
    """The network's encoder as users take it home, sharing its weights."""
    return SensorEncoder(model.encoder, config.model, config.data).to(model.encoder.norm.weight.device)


def default_device() -> str:
    """The GPU that the launcher gave this process, or the CPU."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
