"""Scores of an encoder: on the validation split after an epoch, and by the published protocol at the end of a search."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from csmae.config import Config, ConfigError
from csmae.data.archive import open_archive
from csmae.data.split import Split
from csmae.distributed import default_device
from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from csmae.retrieval.protocol import evaluate
from csmae.retrieval.scores import LabeledScenes, direction_scores, partner_scores, rank_directions


def validation_scores(features: dict[str, Tensor], validation: Split, k: int) -> dict[str, float]:
    """Score retrieval within the validation split: its first half queries its second half.

    Args:
        features: Features of the split's scenes, as ``embed`` returns them.
        validation: The split; gives the labels.
        k: Scenes retrieved per query.

    Returns:
        If both halves have labels, ``val/f1_mean``, ``val/f1/s1_to_s2`` and others (see ``direction_scores``); over
        the whole split, ``val/recall_at_1`` and ``val/mrr`` (see ``partner_scores``).

    Raises:
        ConfigError: A half has fewer intact scenes than needed.
    """
    labels_nc = torch.from_numpy(validation.labels()).to(features["s1"].device)
    scenes, half = LabeledScenes(features, labels_nc), len(validation) // 2
    queries, archive = scenes.intact(slice(half)), scenes.intact(slice(half, None))
    num_queries, num_scenes = len(queries.labels_nc), len(archive.labels_nc)
    if num_queries == 0 or num_scenes < k:
        raise ConfigError(
            f"eval.k {k} needs a query and as many scenes to retrieve from: without the damaged pairs there are"
            f" {num_queries} and {num_scenes}"
        )
    scores: dict[str, float] = {}
    if queries.labels_nc.any() and archive.labels_nc.any():
        rankings = rank_directions(queries.features, archive.features, k)
        scores = direction_scores(rankings, queries.labels_nc, archive.labels_nc)
    scores |= partner_scores(scenes.intact().features)
    return {f"val/{name}": value for name, value in scores.items()}


def final_scores(config: Config, encoder_dir: Path | None = None, device: str | None = None) -> dict[str, float]:
    """Score an encoder by the published protocol, see ``csmae.retrieval.protocol.evaluate``.

    Args:
        config: Gives the archive and k.
        encoder_dir: Folder of the encoder; if None, the untrained encoder of the configuration is scored.
        device: Such as ``cuda:0``; if None, the GPU of this process, or the CPU.

    Returns:
        ``test/f1_mean``, ``test/f1/s1_to_s2`` and others; ``test/recall_at_1`` and ``test/mrr`` without labels.
    """
    encoder = SensorEncoder.load(encoder_dir) if encoder_dir else SensorEncoder.from_model(build_model(config), config)
    encoder.to(torch.device(device) if device else default_device()).eval()
    evaluation = evaluate(encoder, open_archive(config.data), config.eval.k, batch_size=config.eval.batch_size)
    return {f"test/{name}": value for name, value in evaluation.scores.items()}
