"""Exact nearest neighbors by cosine similarity, block by block.

Q queries, N scenes of a block, D width, K retrieved scenes. On a CPU with int8 or bfloat16 instructions, quantized bounds
(``csmae.retrieval.quantized``) leave few candidates, whose similarities are then computed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from csmae.blas import single_threaded_blas
from csmae.cpus import usable_cpus
from csmae.retrieval import quantized
from csmae.retrieval.quantized import Bounds, BoundsFactory

QUERY_BLOCK = 512
"""Most queries that a thread compares with a block of the archive."""
ARCHIVE_BLOCK = 16384
"""Most scenes in a block of the archive; with ``QUERY_BLOCK`` it limits a thread's similarities to 32 MiB."""


class Hits(NamedTuple):
    """Retrieved scenes of each query, the most similar first."""

    scores_qk: Tensor
    """Cosine similarities."""
    indices_qk: Tensor
    """Indices in the archive."""


class ArchiveBlock(NamedTuple):
    """Consecutive scenes of the archive."""

    features_nd: Tensor
    """L2-normalized."""
    start: int
    """Index of the first scene."""
    bounds: dict[torch.dtype, Bounds]
    """By dtype, quantized bounds on the similarities of all queries with these scenes."""


def search(queries_qd: Tensor, archive: Iterable[Tensor], k: int) -> Hits:
    """Find exact nearest neighbors by cosine similarity in an archive that may be larger than memory.

    Each block is read once and compared with all queries, so memory grows with Q·(D + K) and not with N. On a CPU, as
    many threads as torch uses share the queries.

    Args:
        queries_qd: L2-normalized features.
        archive: The archive's L2-normalized features in blocks of at most ``ARCHIVE_BLOCK`` scenes, on the same device.
            Zero rows are damaged scenes, which are never found.
        k: Scenes to retrieve, at most N.

    Returns:
        K columns, or fewer if the archive has fewer intact scenes.
    """
    on_cpu = queries_qd.device.type == "cpu"
    num_threads = min(torch.get_num_threads(), usable_cpus()) if on_cpu else 1
    dtypes = quantized.useful_dtypes(queries_qd, k)
    query_blocks = [QueryBlock(queries_qd, rows, k, dtypes) for rows in _even_slices(len(queries_qd), num_threads)]
    num_threads = min(num_threads, len(query_blocks))
    with torch.inference_mode(False):  # threads without inference mode write into the buffers
        buffers = [queries_qd.new_empty(query_blocks[0].size * ARCHIVE_BLOCK) for _ in range(num_threads)]
    intact, start = _IntactScenes(), 0
    with _single_threaded(), ThreadPoolExecutor(num_threads, initializer=_use, initargs=(queries_qd.device,)) as pool:
        factory = BoundsFactory(queries_qd, pool)
        for features_nd in map(intact.select, archive):
            needed = {part.dtypes[0] for part in query_blocks if part.dtypes}
            block = ArchiveBlock(features_nd, start, factory.bounds(features_nd, needed, k))

            def work(thread: int, block: ArchiveBlock = block) -> None:
                for query_block in query_blocks[thread::num_threads]:
                    query_block.compare(block, buffers[thread])

            list(pool.map(work, range(num_threads)))
            start += len(features_nd)
    hits = Hits(*(torch.cat(column) for column in zip(*(part.hits for part in query_blocks), strict=True)))
    return hits._replace(indices_qk=intact.archive_indices(hits.indices_qk))


class QueryBlock:
    """Some of the queries, and their best hits so far.

    Args:
        queries_qd: All queries, L2-normalized.
        rows: The queries of this block.
        k: Scenes to retrieve.
        dtypes: Dtypes of quantized bounds to try, the coarsest first.
    """

    def __init__(self, queries_qd: Tensor, rows: slice, k: int, dtypes: tuple[torch.dtype, ...]) -> None:
        self._queries_qd, self._rows, self._k = queries_qd[rows], rows, k
        self.size = len(self._queries_qd)
        empty = queries_qd.new_empty(self.size, 0)
        self.hits = Hits(empty, empty.long())
        self.dtypes = dtypes
        """Dtypes whose bounds may still leave few candidates."""

    def compare(self, block: ArchiveBlock, buffer: Tensor) -> None:
        """Merge the best scenes of a block into the hits; ``buffer`` is memory for similarities."""
        start = self._compare_candidates(block, buffer)
        scenes_nd = block.features_nd[start:]
        if len(scenes_nd):
            similarity_qn = buffer[: self.size * len(scenes_nd)].view(self.size, -1)
            _matmul(self._queries_qd, scenes_nd, similarity_qn)
            self._merge(_topk(similarity_qn, min(self._k, len(scenes_nd))), block.start + start)

    def _compare_candidates(self, block: ArchiveBlock, buffer: Tensor) -> int:
        """Compare only candidates, tile by tile, as long as bounds leave few; returns the number of scenes done."""
        start, bounds = 0, block.bounds.get(self.dtypes[0]) if self.dtypes else None
        for tile in quantized.tiles(len(block.features_nd), self._k) if bounds else ():
            assert bounds
            kth_best_q = self.hits.scores_qk[:, -1] if self.hits.scores_qk.shape[1] == self._k else None
            hits = bounds.topk_candidates(self._rows, tile, self._k, kth_best_q, buffer)
            if hits is None:
                self.dtypes = self.dtypes[1:]
                break
            self._merge(Hits(*hits), block.start + tile.start)
            start = tile.stop
        return start

    def _merge(self, hits: Hits, start: int) -> None:
        """Merge hits whose indices count from the scene ``start``."""
        scores = torch.cat([self.hits.scores_qk, hits.scores_qk], dim=1)
        indices = torch.cat([self.hits.indices_qk, hits.indices_qk + start], dim=1)
        scores, order = scores.topk(min(self._k, scores.shape[1]), dim=1)
        self.hits = Hits(scores, indices.gather(1, order))


class _IntactScenes:
    """Removes damaged scenes from blocks, and maps indices among the intact scenes back to the archive.

    Features of damaged scenes are zero: a similarity of 0 would rank before all scenes that are unlike the query.
    """

    def __init__(self) -> None:
        self._num_scenes = 0
        self._damaged: list[Tensor] = []

    def select(self, block_nd: Tensor) -> Tensor:
        """The intact scenes of the next block."""
        # Reading one column is cheap, and intact scenes seldom have a zero there.
        suspects = (block_nd[:, 0] == 0).nonzero()[:, 0]
        damaged = suspects[~block_nd[suspects].any(dim=1)]
        self._damaged.append(damaged + self._num_scenes)
        self._num_scenes += len(block_nd)
        if not len(damaged):
            return block_nd
        keep = torch.ones(len(block_nd), dtype=torch.bool, device=block_nd.device)
        keep[damaged] = False
        return block_nd[keep]

    def archive_indices(self, indices_qk: Tensor) -> Tensor:
        """Convert indices among the intact scenes to indices in the archive."""
        damaged = torch.cat(self._damaged) if self._damaged else indices_qk.new_empty(0)
        # The damaged scene number i comes after damaged[i] - i intact ones.
        num_intact_before = damaged - torch.arange(len(damaged), device=damaged.device)
        return indices_qk + torch.searchsorted(num_intact_before, indices_qk.contiguous(), right=True)


def _use(device: torch.device) -> None:
    """Select the device in a new thread, which otherwise uses GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _even_slices(count: int, num_threads: int) -> list[slice]:
    """Split queries into slices of at most ``QUERY_BLOCK``, equally many for each thread."""
    rounds = -(-count // (QUERY_BLOCK * num_threads))
    size = -(-count // (rounds * num_threads))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Limit numpy and torch to the calling thread: their own threads would compete with ours for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with single_threaded_blas(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR")  # beta in torch; quantized.py uses it, and tests cover it
            yield
    finally:
        torch.set_num_threads(before)


def _matmul(queries_qd: Tensor, block_nd: Tensor, out_qn: Tensor) -> None:
    """Write similarities into a buffer. On a CPU numpy's OpenBLAS multiplies, because torch's MKL is slow on AMD."""
    if queries_qd.device.type == "cpu":
        np.matmul(queries_qd.numpy(), block_nd.numpy().T, out=out_qn.numpy())
    else:
        torch.matmul(queries_qd, block_nd.T, out=out_qn)


def _topk(similarity_qn: Tensor, k: int) -> Hits:
    """The k largest of each row; only the k groups with the largest maxima and the ungrouped remainder are sorted."""
    num_groups = similarity_qn.shape[1] // quantized.GROUP
    if num_groups <= 2 * k:
        return Hits(*similarity_qn.topk(k, dim=1))
    num_grouped = num_groups * quantized.GROUP
    maxima = similarity_qn[:, :num_grouped].unflatten(1, (num_groups, quantized.GROUP)).amax(2)
    groups = maxima.topk(k, dim=1, sorted=False).indices
    members = torch.arange(quantized.GROUP, device=groups.device)
    remainder = torch.arange(num_grouped, similarity_qn.shape[1], device=groups.device).expand(len(groups), -1)
    indices = torch.cat([(groups[:, :, None] * quantized.GROUP + members).flatten(1), remainder], dim=1)
    scores, order = similarity_qn.gather(1, indices).topk(k, dim=1)
    return Hits(scores, indices.gather(1, order))
