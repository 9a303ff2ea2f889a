"""Retrieval scores: F1 by labels; recall and mean reciprocal rank by partner.

Q queries, N archive scenes, D width, K retrieved scenes, C classes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csmae.out_of_memory import retry_with_half
from csmae.retrieval.nearest import ARCHIVE_BLOCK, search
from csmae.sensors import DIRECTIONS

BLOCK = 512
"""Queries that are scored at a time."""


class LabeledScenes(NamedTuple):
    """Features and labels of the same scenes."""

    features: dict[str, Tensor]
    """By sensor, L2-normalized (N, D); zero for damaged scenes."""
    labels_nc: Tensor
    """Multi-hot."""

    def intact(self, rows: slice = slice(None)) -> LabeledScenes:
        """The scenes in ``rows`` that are not damaged."""
        keep = self.features["s1"][rows].any(dim=1)
        features = {sensor: features_nd[rows][keep] for sensor, features_nd in self.features.items()}
        return LabeledScenes(features, self.labels_nc[rows][keep])


def rank_directions(queries: dict[str, Tensor], archive: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Rank the archive exactly by cosine similarity in each direction.

    Args:
        queries, archive: By sensor, L2-normalized features on one device, (Q, D) and (N, D). Zero rows of the archive are
            damaged scenes, which are never found.
        k: Scenes to retrieve, at most N.

    Returns:
        By direction, archive indices (Q, K), the most similar first; fewer columns if fewer scenes are intact.
    """
    rankings = {}
    for direction in DIRECTIONS:
        source, target = direction.split("_to_")
        rankings[direction] = search(queries[source], archive[target].split(ARCHIVE_BLOCK), k).indices_qk
    return rankings


def label_scores(query_labels_qc: Tensor, archive_labels_nc: Tensor, ranked_qk: Tensor) -> dict[str, float]:
    """Compare the labels of retrieved scenes with those of their query.

    For a pair with label sets q and r: P = |q∧r| / |r| and R = |q∧r| / |q|, each 0 if its divisor is 0.

    Args:
        query_labels_qc, archive_labels_nc: Multi-hot labels.
        ranked_qk: Retrieved archive indices of each query.

    Returns:
        ``precision`` and ``recall``: means over all pairs; ``f1_of_means``: their harmonic mean, which compares with
        arXiv 2401.07782; ``mean_pair_f1``: the mean F1 of the pairs.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    archive = archive_labels_nc.float()
    for query, ranked in zip(query_labels_qc.float().split(BLOCK), ranked_qk.split(BLOCK), strict=True):
        retrieved = archive[ranked]
        shared = torch.einsum("qc,qkc->qk", query, retrieved)
        num_query, num_retrieved = query.sum(1, keepdim=True), retrieved.sum(2)
        precision = shared / num_retrieved.clamp(min=1)
        recall = shared / num_query.clamp(min=1)
        pair_f1 = 2 * shared / (num_query + num_retrieved).clamp(min=1)
        sums += torch.stack([t.double().sum() for t in (precision, recall, pair_f1)]).cpu()
    precision_mean, recall_mean, pair_f1_mean = (sums / ranked_qk.numel()).tolist()
    total = precision_mean + recall_mean
    return {
        "precision": precision_mean,
        "recall": recall_mean,
        "f1_of_means": 2 * precision_mean * recall_mean / total if total else 0.0,
        "mean_pair_f1": pair_f1_mean,
    }


def class_hit_rates(query_labels_qc: Tensor, archive_labels_nc: Tensor, ranked_qk: Tensor) -> Tensor:
    """For each class: of the scenes retrieved for queries with this class, the fraction that has it too.

    Args:
        query_labels_qc, archive_labels_nc: Multi-hot labels.
        ranked_qk: Retrieved archive indices of each query.

    Returns:
        (C,) float64 on the CPU; NaN for a class without queries.
    """
    num_classes = query_labels_qc.shape[1]
    hits, queries = (torch.zeros(num_classes, dtype=torch.float64) for _ in range(2))
    archive = archive_labels_nc.float()
    for query, ranked in zip(query_labels_qc.float().split(BLOCK), ranked_qk.split(BLOCK), strict=True):
        hits += torch.einsum("qc,qkc->c", query, archive[ranked]).double().cpu()
        queries += query.sum(0).double().cpu()
    return hits / (queries * ranked_qk.shape[1])


def direction_scores(
    rankings: dict[str, Tensor], query_labels_qc: Tensor, archive_labels_nc: Tensor
) -> dict[str, float]:
    """Label scores of the rankings of the four directions.

    Returns:
        ``f1/<direction>`` (``f1_of_means`` of ``label_scores``), ``mean_pair_f1/<direction>``,
        ``precision/<direction>``, ``recall/<direction>``, and ``f1_mean``: the mean of ``f1`` over the directions.
    """
    scores: dict[str, float] = {}
    for direction, ranked in rankings.items():
        by_name = label_scores(query_labels_qc, archive_labels_nc, ranked)
        scores |= {f"{name.removesuffix('_of_means')}/{direction}": value for name, value in by_name.items()}
    scores["f1_mean"] = float(np.mean([scores[f"f1/{direction}"] for direction in DIRECTIONS]))
    return scores


def partner_scores(features: dict[str, Tensor]) -> dict[str, float]:
    """Measure how well each scene's image from the other sensor is found; needs no labels.

    Args:
        features: By sensor, L2-normalized features (N, D) of the same N scenes.

    Returns:
        ``recall_at_1``: fraction of scenes whose partner ranks first; ``mrr``: mean reciprocal rank of the partner. Both
        are averaged over s1 to s2 and s2 to s1. Ties count against the partner.
    """
    pairs = (features["s1"], features["s2"]), (features["s2"], features["s1"])
    ranks = torch.cat([retry_with_half(partial(_partner_ranks, *pair), BLOCK, "scoring")[0] for pair in pairs])
    return {"recall_at_1": float((ranks == 1).double().mean()), "mrr": float((1 / ranks.double()).mean())}


def _partner_ranks(queries_nd: Tensor, archive_nd: Tensor, block_size: int) -> Tensor:
    """1-based rank of each query's own scene in the archive: (N,)."""
    ranks, start = [], 0
    for block in queries_nd.split(block_size):
        similarity = block @ archive_nd.T
        partner = similarity[torch.arange(len(block)), torch.arange(start, start + len(block))]
        ranks.append((similarity >= partner[:, None]).sum(1))
        start += len(block)
    return torch.cat(ranks)
