"""Sensor-agnostic image retrieval: embed a split, rank an archive, score what was found.

Q queries, N archive scenes, D width, K retrieved scenes, C classes. A direction such as ``s1_to_s2`` queries with S1
features and ranks S2 features.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from threadpoolctl import threadpool_limits
from torch import Tensor

from csmae.data.archive import Split
from csmae.data.loader import batches, sequential_rows
from csmae.encoders import SensorEncoder

DIRECTIONS = ("s1_to_s1", "s1_to_s2", "s2_to_s1", "s2_to_s2")

BLOCK = 512
"""Queries that a thread ranks at once, at most."""
ARCHIVE_BLOCK = 16384
"""Archive scenes that are compared at once: with ``BLOCK`` it bounds a thread's memory, 32 MiB of similarities."""
GROUP = 64
"""Similarities of which only the largest is looked at first."""


class Hits(NamedTuple):
    """What was found for each query, the most similar first."""

    scores_qk: Tensor
    """Cosine similarities."""
    indices_qk: Tensor
    """Places in the archive."""


@torch.no_grad()
def embed(
    encoder: SensorEncoder, split: Split, batch_size: int, advance: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """Features of the sensors of every scene of a split, computed without masking.

    Collective: the ranks of ``torch.distributed`` share the work and all get the whole.

    Args:
        encoder: On the device that shall compute.
        split: Scenes to embed, N of them.
        batch_size: Pairs a batch.
        advance: Told of each batch's number of scenes.

    Returns:
        By sensor of the split, L2-normalised float32 features (N, D) in its order, on the encoder's device; zero for pairs
        that are damaged and were skipped.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = sequential_rows(len(split), batch_size, rank, world_size)
    found = torch.zeros(len(split.sensors), len(split), encoder.width, device=encoder.device)
    for row, batch in zip(rows, batches(split, rows, pin=encoder.device.type == "cuda"), strict=True):
        features = encoder.embed(batch)
        found[:, torch.as_tensor(row, device=encoder.device)] = torch.stack([features[s] for s in split.sensors])
        if advance:
            advance(len(row))
    found[:, torch.as_tensor(split.damaged_rows(), device=encoder.device)] = 0
    if world_size > 1:
        dist.all_reduce(found)
    return dict(zip(split.sensors, F.normalize(found, dim=2), strict=True))


def rank_archive(queries_qd: Tensor, archive_nd: Tensor, k: int) -> Tensor:
    """Exact nearest neighbours by cosine similarity.

    Args:
        queries_qd, archive_nd: L2-normalised features on one device.
        k: Scenes to retrieve, at most N.

    Returns:
        (Q, K) archive indices, the most similar first.
    """
    return search(queries_qd, archive_nd.split(ARCHIVE_BLOCK), k).indices_qk


def search(queries_qd: Tensor, archive: Iterable[Tensor], k: int) -> Hits:
    """Exact nearest neighbours by cosine similarity in an archive that need not fit into memory.

    Each block is read once and compared with all queries, so memory grows with Q·(D + K) and not with N. On a CPU the
    queries are shared by as many threads as torch has.

    Args:
        queries_qd: L2-normalised features.
        archive: The archive's L2-normalised features, in blocks of ``ARCHIVE_BLOCK`` scenes at most, on the same device.
        k: Scenes to retrieve, at most N.
    """
    num_threads = torch.get_num_threads() if queries_qd.device.type == "cpu" else 1
    parts = _even_parts(queries_qd, num_threads)
    best = [Hits(part.new_empty(len(part), 0), part.new_empty(len(part), 0, dtype=torch.long)) for part in parts]
    tiles = [queries_qd.new_empty(len(parts[0]) * ARCHIVE_BLOCK) for _ in parts[:num_threads]]
    with _single_threads(), ThreadPoolExecutor(len(tiles)) as pool:
        start = 0
        for block in archive:

            def work(thread: int, block: Tensor = block, start: int = start) -> None:
                for number in range(thread, len(parts), len(tiles)):
                    similarity_qn = tiles[thread][: len(parts[number]) * len(block)].view(-1, len(block))
                    _compare(parts[number], block, similarity_qn)
                    best[number] = _merge(best[number], _largest(similarity_qn, min(k, len(block))), start, k)

            list(pool.map(work, range(len(tiles))))
            start += len(block)
    return Hits(*(torch.cat(column) for column in zip(*best, strict=True)))


def _even_parts(queries_qd: Tensor, num_threads: int) -> tuple[Tensor, ...]:
    """Blocks of queries, as many for each thread."""
    rounds = -(-len(queries_qd) // (BLOCK * num_threads))
    parts: tuple[Tensor, ...] = queries_qd.split(-(-len(queries_qd) // (rounds * num_threads)))
    return parts


@contextmanager
def _single_threads() -> Iterator[None]:
    """Numpy and torch work in the calling thread alone: their pools would wait for each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, "blas"):
            yield
    finally:
        torch.set_num_threads(before)


def _merge(best: Hits, found: Hits, start: int, k: int) -> Hits:
    """The K best of earlier blocks and of the one that begins at ``start``."""
    scores = torch.cat([best.scores_qk, found.scores_qk], dim=1)
    indices = torch.cat([best.indices_qk, found.indices_qk + start], dim=1)
    scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
    return Hits(scores, indices.gather(1, order))


def _compare(queries_qd: Tensor, block_nd: Tensor, out_qn: Tensor) -> None:
    """Similarities into memory that is used again. On a CPU numpy's OpenBLAS multiplies: torch's MKL is slow on AMD."""
    if queries_qd.device.type == "cpu":
        np.matmul(queries_qd.numpy(), block_nd.numpy().T, out=out_qn.numpy())
    else:
        torch.matmul(queries_qd, block_nd.T, out=out_qn)


def _largest(similarity_qn: Tensor, k: int) -> Hits:
    """The K largest of each row: they lie in the K groups whose largest are largest, or in the rest behind the groups."""
    num_groups = similarity_qn.shape[1] // GROUP
    if num_groups <= 2 * k:
        return Hits(*similarity_qn.topk(k, dim=1))
    whole = num_groups * GROUP
    groups = similarity_qn[:, :whole].unflatten(1, (num_groups, GROUP)).amax(2).topk(k, dim=1, sorted=False).indices
    members = torch.arange(GROUP, device=groups.device)
    rest = torch.arange(whole, similarity_qn.shape[1], device=groups.device).expand(len(groups), -1)
    places = torch.cat([(groups[:, :, None] * GROUP + members).flatten(1), rest], dim=1)
    scores, order = similarity_qn.gather(1, places).topk(k, dim=1)
    return Hits(scores, places.gather(1, order))


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
    ranks = torch.cat([_partner_ranks(features["s1"], features["s2"]), _partner_ranks(features["s2"], features["s1"])])
    return {"recall_at_1": float((ranks == 1).double().mean()), "mrr": float((1 / ranks.double()).mean())}


def _partner_ranks(queries_nd: Tensor, archive_nd: Tensor) -> Tensor:
    """1-based rank of each query's namesake in the archive: (N,)."""
    ranks, start = [], 0
    for block in queries_nd.split(BLOCK):
        similarity = block @ archive_nd.T
        own = similarity[torch.arange(len(block)), torch.arange(start, start + len(block))]
        ranks.append((similarity >= own[:, None]).sum(1))
        start += len(block)
    return torch.cat(ranks)
