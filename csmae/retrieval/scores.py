"""Scores of a ranked archive: F1 by labels, recall and MRR by partner."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from csmae.out_of_memory import halved_until_it_fits
from csmae.retrieval.nearest import ARCHIVE_BLOCK, search
from csmae.sensors import DIRECTIONS

BLOCK = 512
"""Queries that are scored at once."""


def rank_archive(queries_qd: Tensor, archive_nd: Tensor, k: int) -> Tensor:
    """Exact nearest neighbours by cosine similarity.

    Args:
        queries_qd, archive_nd: L2-normalised features on one device; archive rows of damaged scenes are zero and never
            found.
        k: Scenes to retrieve, at most N.

    Returns:
        (Q, K) archive indices, the most similar first; fewer columns where fewer scenes are intact.
    """
    return search(queries_qd, archive_nd.split(ARCHIVE_BLOCK), k).indices_qk


def label_scores(query_labels_qc: Tensor, archive_labels_nc: Tensor, ranked_qk: Tensor) -> dict[str, float]:
    """How well the labels of retrieved scenes match those of their query.

    For a pair with label sets q and r: P = |q∧r| / |r| and R = |q∧r| / |q|, 0 where the divisor is.

    Args:
        query_labels_qc, archive_labels_nc: Multi-hot labels.
        ranked_qk: Retrieved archive indices of each query.

    Returns:
        ``precision`` and ``recall``: means over all pairs; ``f1_of_means``: their harmonic mean, which compares with
        arXiv 2401.07782; ``mean_pair_f1``: the mean of each pair's own F1.
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
    both = precision_mean + recall_mean
    return {
        "precision": precision_mean,
        "recall": recall_mean,
        "f1_of_means": 2 * precision_mean * recall_mean / both if both else 0.0,
        "mean_pair_f1": pair_f1_mean,
    }


def class_shares(query_labels_qc: Tensor, archive_labels_nc: Tensor, ranked_qk: Tensor) -> Tensor:
    """For each class, the share of scenes that carry it too among those retrieved for the queries that carry it.

    Args:
        query_labels_qc, archive_labels_nc: Multi-hot labels.
        ranked_qk: Retrieved archive indices of each query.

    Returns:
        (C,) float64 on the CPU; NaN for a class that no query carries.
    """
    num_classes = query_labels_qc.shape[1]
    hits, queries = (torch.zeros(num_classes, dtype=torch.float64) for _ in range(2))
    archive = archive_labels_nc.float()
    for query, ranked in zip(query_labels_qc.float().split(BLOCK), ranked_qk.split(BLOCK), strict=True):
        hits += torch.einsum("qc,qkc->c", query, archive[ranked]).double().cpu()
        queries += query.sum(0).double().cpu()
    return hits / (queries * ranked_qk.shape[1])


def directions(queries: dict[str, Tensor], archive: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The four directions with their query and archive features."""
    for direction in DIRECTIONS:
        source, target = direction.split("_to_")
        yield direction, queries[source], archive[target]


def retrieval_scores(
    queries: dict[str, Tensor], query_labels_qc: Tensor, archive: dict[str, Tensor], archive_labels_nc: Tensor, k: int
) -> dict[str, float]:
    """Label scores at k of the four directions.

    Returns:
        ``f1/<direction>`` (of means), ``mean_pair_f1/<direction>``, ``precision/<direction>``,
        ``recall/<direction>``, and ``f1_mean``: the mean of ``f1`` over the directions.
    """
    return direction_scores(rank_directions(queries, archive, k), query_labels_qc, archive_labels_nc)


def rank_directions(queries: dict[str, Tensor], archive: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Of each direction, the archive indices (Q, K), the most similar first."""
    return {direction: rank_archive(q, a, k) for direction, q, a in directions(queries, archive)}


def direction_scores(
    rankings: dict[str, Tensor], query_labels_qc: Tensor, archive_labels_nc: Tensor
) -> dict[str, float]:
    """Label scores of rankings that are there already; see ``retrieval_scores``."""
    scores: dict[str, float] = {}
    for direction, ranked in rankings.items():
        found = label_scores(query_labels_qc, archive_labels_nc, ranked)
        scores |= {f"{name.removesuffix('_of_means')}/{direction}": value for name, value in found.items()}
    scores["f1_mean"] = float(np.mean([scores[f"f1/{direction}"] for direction in DIRECTIONS]))
    return scores


def partner_scores(features: dict[str, Tensor]) -> dict[str, float]:
    """How often a scene's own image from the other sensor is found: no labels needed.

    Args:
        features: By sensor, L2-normalised features of the same N scenes.

    Returns:
        ``recall_at_1``: share of scenes whose partner ranks first; ``mrr``: mean reciprocal rank of the partner; both
        averaged over s1 to s2 and s2 to s1. Ties count against the partner.
    """
    both = (features["s1"], features["s2"]), (features["s2"], features["s1"])
    ranks = torch.cat([halved_until_it_fits(partial(_partner_ranks, *pair), BLOCK, "scoring")[0] for pair in both])
    return {"recall_at_1": float((ranks == 1).double().mean()), "mrr": float((1 / ranks.double()).mean())}


def _partner_ranks(queries_nd: Tensor, archive_nd: Tensor, block_size: int) -> Tensor:
    """1-based rank of each query's namesake in the archive: (N,)."""
    ranks, start = [], 0
    for block in queries_nd.split(block_size):
        similarity = block @ archive_nd.T
        own = similarity[torch.arange(len(block)), torch.arange(start, start + len(block))]
        ranks.append((similarity >= own[:, None]).sum(1))
        start += len(block)
    return torch.cat(ranks)
