"""Exact nearest neighbours by cosine similarity, block by block.

Q queries, N scenes of a block, D width, K retrieved scenes. On a CPU that multiplies bfloat16 in hardware, twice as fast as
float32, a rough similarity with a proven margin leaves few scenes, whose similarities are then computed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

BLOCK = 512
"""Queries that a thread ranks at once, at most."""
ARCHIVE_BLOCK = 16384
"""Archive scenes that are compared at once: with ``BLOCK`` it bounds a thread's memory, 32 MiB of similarities."""
GROUP = 64
"""Similarities of which only the largest is looked at first."""
TILE = 8192
"""Archive scenes of a rough comparison: with ``BLOCK`` 8 MiB, which stay in the cache."""
TILE_MIN = 1024
"""With fewer the exact comparison is as fast."""
MANY = 32
"""Scenes, or groups of them, that a rough comparison may leave for a query on average; with more it does not pay."""
CHUNK = 1024
"""Scenes that are roughened at once."""
FEW = 128
"""Queries for which it does not pay either: reading the archive is what takes time."""
SUM_ERROR = 5e-5
"""More than what adding up a thousand products in float32 can be wrong by."""


class Hits(NamedTuple):
    """What was found for each query, the most similar first."""

    scores_qk: Tensor
    """Cosine similarities."""
    indices_qk: Tensor
    """Places in the archive."""


class Rough(NamedTuple):
    """Features less the queries' mean in bfloat16: the smaller they are, the less rounding takes."""

    features: Tensor
    """With two columns more, so that products are similarities but for a constant of each query."""
    norms: Tensor
    """Before rounding."""
    errors: Tensor
    """Norms of what rounding took."""


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
    mean_d = queries_qd.mean(0) if _rough_pays(queries_qd, k) else None
    pieces = _even_parts(queries_qd, num_threads)
    parts = [Part(piece, mean_d, k) for piece in pieces]
    memory = [queries_qd.new_empty(len(pieces[0]) * ARCHIVE_BLOCK) for _ in pieces[:num_threads]]
    start = 0
    with _single_threads(), ThreadPoolExecutor(len(memory)) as pool:
        for block in archive:
            mean_d = mean_d if any(part.rough for part in parts) else None
            shared = Block(block, start, None if mean_d is None else _roughen_all(block, mean_d, pool))

            def work(thread: int, shared: Block = shared) -> None:
                for part in parts[thread :: len(memory)]:
                    part.compare(shared, memory[thread])

            list(pool.map(work, range(len(memory))))
            start += len(block)
    return Hits(*(torch.cat(column) for column in zip(*(part.best for part in parts), strict=True)))


def _rough_pays(queries_qd: Tensor, k: int) -> bool:
    if queries_qd.device.type != "cpu" or len(queries_qd) <= FEW or 2 * k > TILE // GROUP:
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


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
        with threadpool_limits(1, "blas"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR")  # torch calls it a beta; its answers are tested here
            yield
    finally:
        torch.set_num_threads(before)


def _roughen(features_nd: Tensor, mean_d: Tensor, query: bool) -> Rough:
    """As ``q·a = (q-m)·(a-m) + m·(a-m) + q·m``; the middle term is the two columns, its leading bits and the rest."""
    centred = features_nd - mean_d
    rough = centred.bfloat16()
    offset = torch.ones(len(features_nd)) if query else centred @ mean_d
    lead = offset.bfloat16()
    rest = lead if query else (offset - lead).bfloat16()
    errors = (centred - rough).norm(dim=1)
    return Rough(torch.cat([rough, lead[:, None], rest[:, None]], dim=1), centred.norm(dim=1), errors)


def _roughen_all(features_nd: Tensor, mean_d: Tensor, pool: ThreadPoolExecutor) -> Rough:
    """In pieces that stay in the threads' caches."""
    pieces = pool.map(lambda piece: _roughen(piece, mean_d, query=False), features_nd.split(CHUNK))
    return Rough(*(torch.cat(column) for column in zip(*pieces, strict=True)))


class Block(NamedTuple):
    """A block of the archive."""

    features_nd: Tensor
    """L2-normalised."""
    start: int
    """Place of its first scene."""
    rough: Rough | None


class Part:
    """Some of the queries, and the best that was found for them so far.

    Args:
        queries_qd: L2-normalised.
        mean_d: Of all queries, where a rough comparison pays.
        k: Scenes to retrieve.
    """

    def __init__(self, queries_qd: Tensor, mean_d: Tensor | None, k: int) -> None:
        self._queries_qd, self._k = queries_qd, k
        none = queries_qd.new_empty(len(queries_qd), 0)
        self.best = Hits(none, none.long())
        self.rough = None if mean_d is None else _roughen(queries_qd, mean_d, query=True)
        self._constants = None if mean_d is None else queries_qd @ mean_d

    def compare(self, block: Block, memory: Tensor) -> None:
        """Take what is better in a block."""
        done = 0
        while self.rough and block.rough and len(block.features_nd) - done >= max(TILE_MIN, GROUP * self._k):
            tile = range(done, min(done + TILE, len(block.features_nd) // GROUP * GROUP))
            if not self._compare_roughly(block, tile):
                self.rough = None  # the scenes are too much alike: from here on exactly
                break
            done = tile.stop
        if done < len(block.features_nd):
            rest_nd = block.features_nd[done:]
            similarity_qn = memory[: len(self._queries_qd) * len(rest_nd)].view(-1, len(rest_nd))
            _multiply(self._queries_qd, rest_nd, similarity_qn)
            self._take(_largest(similarity_qn, min(self._k, len(rest_nd))), block.start + done)

    def _compare_roughly(self, block: Block, tile: range) -> bool:
        """Take what is better in a part of a block; False where too many scenes may be."""
        assert self.rough and block.rough
        similarity_qn = self.rough.features @ block.rough.features[tile.start : tile.stop].T
        groups = similarity_qn.unflatten(1, (-1, GROUP))
        tops = groups.amax(2)
        # rounding keeps the order: what is not below the floor is not below it in bfloat16 either
        floor = self._floor(block.rough, tops).bfloat16()[:, None]
        row, group = (tops >= floor).nonzero(as_tuple=True)
        if len(row) > MANY * len(tops):
            return False
        which, member = (groups[row, group] >= floor[row]).nonzero(as_tuple=True)
        row, place = row[which], tile.start + group[which] * GROUP + member
        if len(row) > MANY * len(tops):
            return False
        counts = torch.bincount(row, minlength=len(tops))
        scores = _products(self._queries_qd, block.features_nd, counts, place)
        self._take(_by_row(row, counts, scores, place), block.start)
        return True

    def _floor(self, block: Rough, tops: Tensor) -> Tensor:
        """Rough similarity that a scene must have to be among the best, for each query."""
        assert self.rough is not None and self._constants is not None
        _, norms, errors = self.rough
        margin = errors * block.norms.max() + (norms + errors) * block.errors.max() + SUM_ERROR
        if self.best.scores_qk.shape[1] == self._k:
            return self.best.scores_qk[:, -1] - self._constants - margin
        top = tops.topk(self._k, dim=1).values[:, -1].float()
        return top - top.abs() / 250 - 2 * margin

    def _take(self, found: Hits, start: int) -> None:
        """Merge what was found in a block that begins at ``start``."""
        scores = torch.cat([self.best.scores_qk, found.scores_qk], dim=1)
        indices = torch.cat([self.best.indices_qk, found.indices_qk + start], dim=1)
        scores, order = scores.topk(min(self._k, scores.shape[1]), dim=1)
        self.best = Hits(scores, indices.gather(1, order))


def _products(queries_qd: Tensor, block_nd: Tensor, counts: Tensor, place: Tensor) -> Tensor:
    """Similarities of each query with so many scenes at these places, in float32."""
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shape = (len(queries_qd), len(block_nd))
    wanted = torch.sparse_csr_tensor(ends, place, torch.zeros(len(place)), shape, check_invariants=False)
    found: Tensor = torch.sparse.sampled_addmm(wanted, queries_qd, block_nd.T, beta=0.0).values()
    return found


def _by_row(row: Tensor, counts: Tensor, scores: Tensor, place: Tensor) -> Hits:
    """Hits of ascending rows, filled up with what is never taken."""
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    shape = (len(counts), int(counts.max()))
    hits = Hits(torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.long))
    hits.scores_qk[row, column] = scores
    hits.indices_qk[row, column] = place
    return hits


def _multiply(queries_qd: Tensor, block_nd: Tensor, out_qn: Tensor) -> None:
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
