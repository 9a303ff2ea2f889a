"""Exact nearest neighbours by cosine similarity, block by block.

Q queries, N scenes of a block, D width, K retrieved scenes. On a CPU that multiplies bytes or bfloat16 in hardware, bounds from
such products leave few scenes, whose similarities are then computed in float32.
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

from csmae.cpus import usable_cpus
from csmae.retrieval.quantized import Bounds, Quantized, kinds, quantize

BLOCK = 512
"""Queries that a thread ranks at once, at most."""
ARCHIVE_BLOCK = 16384
"""Archive scenes that are compared at once: with ``BLOCK`` it bounds a thread's memory, 32 MiB of similarities."""
GROUP = 64
"""Similarities of which only the largest is looked at first."""
TILE = 8192
"""Archive scenes whose bounds are looked at, at once: with ``BLOCK`` 16 MiB, which stay in the cache."""
TILE_MIN = 1024
"""With fewer the exact comparison is as fast."""
MANY = 128
"""Scenes that bounds may leave for a query on average; with more they do not pay."""
FEW = 128
"""Queries for which they do not pay either: reading the archive is what takes time."""


class Hits(NamedTuple):
    """What was found for each query, the most similar first."""

    scores_qk: Tensor
    """Cosine similarities."""
    indices_qk: Tensor
    """Places in the archive."""


class Block(NamedTuple):
    """A block of the archive."""

    features_nd: Tensor
    """L2-normalised."""
    start: int
    """Place of its first scene."""
    bounds: dict[torch.dtype, Bounds]
    """On its similarities with all queries, from products of these kinds of numbers."""


def search(queries_qd: Tensor, archive: Iterable[Tensor], k: int) -> Hits:
    """Exact nearest neighbours by cosine similarity in an archive that need not fit into memory.

    Each block is read once and compared with all queries, so memory grows with Q·(D + K) and not with N. On a CPU the
    queries are shared by as many threads as torch has.

    Args:
        queries_qd: L2-normalised features.
        archive: The archive's L2-normalised features, in blocks of ``ARCHIVE_BLOCK`` scenes at most, on the same device.
            Rows that are all zero are damaged scenes and are never found.
        k: Scenes to retrieve, at most N.

    Returns:
        K columns, or fewer where the archive holds fewer intact scenes.
    """
    num_threads = min(torch.get_num_threads(), usable_cpus()) if queries_qd.device.type == "cpu" else 1
    pays = queries_qd.device.type == "cpu" and queries_qd.dtype == torch.float32
    pays = pays and len(queries_qd) > FEW and 2 * k <= TILE // GROUP
    usable = kinds() if pays else ()
    parts = [Part(queries_qd, rows, k, usable) for rows in _even_parts(len(queries_qd), num_threads)]
    with torch.inference_mode(False):  # other threads write into it
        memory = [queries_qd.new_empty(parts[0].size * ARCHIVE_BLOCK) for _ in parts[:num_threads]]
    mean_d = queries_qd.mean(0)
    rough: dict[torch.dtype, Quantized] = {}
    intact = _Intact()
    start = 0
    with _single_threads(), ThreadPoolExecutor(len(memory), initializer=_use, initargs=(queries_qd.device,)) as pool:
        for block in map(intact.take, archive):
            bounds = {}
            for kind in {kind for part in parts for kind in part.kinds[:1]} if len(block) >= _fewest(k) else ():
                rough[kind] = rough.get(kind) or quantize(queries_qd, mean_d, kind, pool)
                bounds[kind] = Bounds(rough[kind], mean_d, quantize(block, mean_d, kind, pool))
            shared = Block(block, start, bounds)

            def work(thread: int, shared: Block = shared) -> None:
                for part in parts[thread :: len(memory)]:
                    part.compare(shared, memory[thread])

            list(pool.map(work, range(len(memory))))
            start += len(block)
    hits = Hits(*(torch.cat(column) for column in zip(*(part.best for part in parts), strict=True)))
    return hits._replace(indices_qk=intact.places(hits.indices_qk))


class _Intact:
    """Leaves damaged scenes out of blocks, and knows where the others lay.

    Their features are zero: a similarity of 0, which would rank before every scene that is unlike the query.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._damaged: list[Tensor] = []

    def take(self, block_nd: Tensor) -> Tensor:
        """The block's intact scenes."""
        suspects = (block_nd[:, 0] == 0).nonzero()[
            :, 0
        ]  # reading one column is cheap, and intact scenes have few zeros
        damaged = suspects[~block_nd[suspects].any(dim=1)]
        self._damaged.append(damaged + self._seen)
        self._seen += len(block_nd)
        if not len(damaged):
            return block_nd
        keep = torch.ones(len(block_nd), dtype=torch.bool, device=block_nd.device)
        keep[damaged] = False
        return block_nd[keep]

    def places(self, indices_qk: Tensor) -> Tensor:
        """Places in the whole archive of places among its intact scenes."""
        damaged = torch.cat(self._damaged) if self._damaged else indices_qk.new_empty(0)
        # The damaged scene number i has damaged[i] - i intact ones before it.
        before = damaged - torch.arange(len(damaged), device=damaged.device)
        return indices_qk + torch.searchsorted(before, indices_qk.contiguous(), right=True)


def _use(device: torch.device) -> None:
    """Let a thread compute on a device: it begins with GPU 0, whichever the one that started it uses."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _fewest(k: int) -> int:
    """Scenes of the smallest tile whose bounds pay."""
    return max(TILE_MIN, GROUP * k)


def _even_parts(count: int, num_threads: int) -> list[slice]:
    """Blocks of queries, as many for each thread."""
    rounds = -(-count // (BLOCK * num_threads))
    size = -(-count // (rounds * num_threads))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


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


class Part:
    """Some of the queries, and the best that was found for them so far.

    Args:
        queries_qd: All of them, L2-normalised.
        rows: Which of them.
        k: Scenes to retrieve.
        kinds: Numbers from whose products bounds may be taken, the coarsest first.
    """

    def __init__(self, queries_qd: Tensor, rows: slice, k: int, kinds: tuple[torch.dtype, ...]) -> None:
        self._queries_qd, self._rows, self._k = queries_qd[rows], rows, k
        self.size = len(self._queries_qd)
        none = queries_qd.new_empty(self.size, 0)
        self.best = Hits(none, none.long())
        self.kinds = kinds
        """Those that may still pay."""

    def compare(self, block: Block, memory: Tensor) -> None:
        """Take what is better in a block."""
        done = 0
        bounds = block.bounds.get(self.kinds[0]) if self.kinds else None
        while bounds and len(block.features_nd) - done >= _fewest(self._k):
            tile = slice(done, min(done + TILE, len(block.features_nd) // GROUP * GROUP))
            if not self._compare_some(block, tile, bounds, memory):
                self.kinds = self.kinds[1:]
                break
            done = tile.stop
        if done < len(block.features_nd):
            similarity_qn = self._view(memory, len(block.features_nd) - done)
            _multiply(self._queries_qd, block.features_nd[done:], similarity_qn)
            self._take(_largest(similarity_qn, min(self._k, similarity_qn.shape[1])), block.start + done)

    def _compare_some(self, block: Block, tile: slice, bounds: Bounds, memory: Tensor) -> bool:
        """Take what is better in a tile of a block; False, and nothing taken, where that may be too many."""
        scenes_nd = block.features_nd[tile]
        bound_qn = self._view(memory, len(scenes_nd))
        bounds.fill(self._rows, tile, bound_qn)
        groups = bound_qn.unflatten(1, (-1, GROUP))
        tops = groups.amax(2)
        least = bounds.least(self._rows, self._least(scenes_nd, groups, tops))[:, None]
        row, group = (tops < least).logical_not().nonzero(as_tuple=True)  # what is not a number is kept, too
        kept = (groups[row, group] < least[row]).logical_not()
        if kept.count_nonzero() > MANY * self.size:
            return False
        which, member = kept.nonzero(as_tuple=True)
        row, place = row[which], group[which] * GROUP + member
        counts = torch.bincount(row, minlength=self.size)
        scores = _products(self._queries_qd, scenes_nd, counts, place)
        self._take(_by_row(row, counts, scores, place), block.start + tile.start)
        return True

    def _least(self, scenes_nd: Tensor, groups: Tensor, tops: Tensor) -> Tensor:
        """Similarity that K scenes are known to have: the best so far, or at first those of the highest bounds."""
        if self.best.scores_qk.shape[1] == self._k:
            return self.best.scores_qk[:, -1]
        likely = tops.topk(self._k, dim=1).indices
        place = likely * GROUP + groups.take_along_dim(likely[:, :, None], 1).argmax(2)
        counts = torch.full((self.size,), self._k)
        scores = _products(self._queries_qd, scenes_nd, counts, place.sort(dim=1).values.flatten())
        return scores.view(-1, self._k).amin(1)

    def _view(self, memory: Tensor, columns: int) -> Tensor:
        return memory[: self.size * columns].view(-1, columns)

    def _take(self, found: Hits, start: int) -> None:
        """Merge what was found among scenes that begin at ``start``."""
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
