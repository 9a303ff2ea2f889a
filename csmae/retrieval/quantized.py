"""Upper bounds on cosine similarities from int8 or bfloat16 products, which leave few candidates for float32.

Q queries, N scenes of a block, D width, K retrieved scenes. Some CPUs multiply int8 or bfloat16 two to four times as fast
as float32. Features are centered by the mean m of the queries, int8 also rotated, and rounded:
``q·a = (q-m)·(a-m) + (q-m)·m + (a-m)·m + m·m``. The rounding error of each feature is known, so the Cauchy-Schwarz
inequality limits the error of the first product: the query's error times the scene's norm plus the rounded query's norm times
the scene's error. Candidates are the scenes whose bound reaches the similarity of the K-th best scene so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVELS = 127
"""Largest int8 value used."""
CLIP_RMS = 4.0
"""Value that ``LEVELS`` represents, in root mean squares; larger ones are clipped, which the errors account for."""
ROTATION = 64
"""Consecutive values that are rotated together, which spreads a channel that is always large."""
CHUNK = 1024
"""Features that a thread quantizes at a time: they fit into its cache."""
SUMMATION_ERROR = 5e-5
"""Upper limit of float32's error in a sum of a thousand products of L2-normalized features."""
BF16_ERROR = 2.0**-9
"""Half of the relative error of a product rounded to bfloat16; it is counted with both factors."""
MIN_SCALE = 1e-12
"""Scale of features that are all equal."""

TILE = 8192
"""Scenes whose bounds are computed at a time: with 512 queries 16 MiB, which stay in the cache."""
MIN_TILE = 1024
"""Smallest tile; below it float32 is as fast."""
GROUP = 64
"""Similarities or bounds per group: the k largest ones are in the k groups with the largest maxima."""
MAX_CANDIDATES = 128
"""Candidates per query, on average, above which float32 is as fast."""
MIN_QUERIES = 128
"""With fewer queries, reading the archive takes most of the time."""


class Quantized(NamedTuple):
    """Features without the queries' mean, rounded."""

    features_nd: Tensor
    """The features themselves, float32."""
    values_nd: Tensor
    """Rounded values; the last dimension is padded with zeros."""
    scale: float
    """Value that 1 represents."""
    norms_n: Tensor
    """Norms before rounding."""
    errors_n: Tensor
    """Norms of the rounding errors."""
    mean_products_n: Tensor
    """Products of the centered features with the mean."""


def useful_dtypes(queries_qd: Tensor, k: int) -> tuple[torch.dtype, ...]:
    """Dtypes whose bounds are faster than float32 for these queries, the fastest and coarsest first; empty if none."""
    few_hits = 2 * k <= TILE // GROUP
    usable = queries_qd.device.type == "cpu" and queries_qd.dtype == torch.float32
    return fast_dtypes() if usable and few_hits and len(queries_qd) >= MIN_QUERIES else ()


@cache
def fast_dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes that this CPU multiplies faster than float32, the fastest first."""
    capabilities = torch.cpu.get_capabilities()
    instructions = {torch.int8: ("avx512_vnni", "amx_int8"), torch.bfloat16: ("avx512_bf16", "amx_bf16")}
    found = [dtype for dtype, names in instructions.items() if any(capabilities.get(name) for name in names)]
    return tuple(dtype for dtype in found if dtype != torch.int8 or _int8_products_are_exact())


def tiles(num_scenes: int, k: int) -> Iterator[slice]:
    """Tiles of a block's scenes; the remainder is too small for bounds to be faster."""
    start = 0
    while num_scenes - start >= max(MIN_TILE, GROUP * k):
        tile = slice(start, min(start + TILE, num_scenes // GROUP * GROUP))
        yield tile
        start = tile.stop


class BoundsFactory:
    """Quantizes the queries once per dtype, and each block of the archive.

    Args:
        queries_qd: All queries.
        pool: Threads that quantize.
    """

    def __init__(self, queries_qd: Tensor, pool: Executor) -> None:
        self._queries_qd, self._pool = queries_qd, pool
        self._mean_d = queries_qd.mean(0)
        self._queries: dict[torch.dtype, Quantized] = {}

    def bounds(self, block_nd: Tensor, dtypes: Iterable[torch.dtype], k: int) -> dict[torch.dtype, Bounds]:
        """Bounds on a block's similarities, by dtype; none if the block is too small."""
        bounds = {}
        for dtype in dtypes if any(True for _ in tiles(len(block_nd), k)) else ():
            if dtype not in self._queries:
                self._queries[dtype] = quantize(self._queries_qd, self._mean_d, dtype, self._pool)
            block = quantize(block_nd, self._mean_d, dtype, self._pool)
            bounds[dtype] = Bounds(self._queries[dtype], self._mean_d, block)
        return bounds


def quantize(features_nd: Tensor, mean_d: Tensor, dtype: torch.dtype, pool: Executor) -> Quantized:
    """Center and round features; int8 values have one common scale."""
    sample = features_nd[:: -(-len(features_nd) // CHUNK)] - mean_d
    rms = float(sample.square().mean().sqrt())
    scale = max(MIN_SCALE, CLIP_RMS / LEVELS * rms) if dtype == torch.int8 else 1.0

    def work(chunk_nd: Tensor) -> tuple[Tensor, ...]:
        centered = chunk_nd - mean_d
        norms = centered.norm(dim=1)
        if dtype == torch.int8:
            padded = pad(centered, (0, -len(mean_d) % ROTATION))
            rotated = padded.unflatten(1, (-1, ROTATION)).matmul(_rotation()).flatten(1)
            rounded = (rotated / scale).round_().clamp_(-LEVELS, LEVELS)
            errors = rotated.sub_(rounded, alpha=scale).norm(dim=1)
        else:
            rounded = centered.to(dtype)
            errors = (centered - rounded).norm(dim=1) + BF16_ERROR * norms
        return rounded.to(dtype), norms, errors, centered @ mean_d

    columns = zip(*pool.map(work, features_nd.split(CHUNK)), strict=True)
    values_nd, norms_n, errors_n, mean_products_n = (torch.cat(column) for column in columns)
    return Quantized(features_nd, values_nd, scale, norms_n, errors_n, mean_products_n)


class Bounds:
    """Upper bounds on the similarities of all queries with the scenes of a block, up to scale and offset of each query.

    Typical rounding errors of the queries are added to the scenes, the excess of an outlier to that query alone, so damaged
    images, far from all others, weaken no other bounds. NaN weakens all bounds so that nothing is skipped.

    Args:
        queries: All queries.
        mean_d: Their mean, by which queries and scenes are centered.
        archive: Scenes of the block.
    """

    def __init__(self, queries: Quantized, mean_d: Tensor, archive: Quantized) -> None:
        self._queries, self._archive = queries, archive
        self._unit = queries.scale * archive.scale
        lengths = queries.norms_n + queries.errors_n
        length, error = lengths.median(), queries.errors_n.median()
        scene_margins = archive.mean_products_n + length * archive.errors_n + error * archive.norms_n
        self._scene_margins_n = scene_margins / self._unit
        excess_q = (lengths - length).relu() * archive.errors_n.max()
        excess_q += (queries.errors_n - error).relu() * archive.norms_n.max()
        self._query_margins_q = queries.mean_products_n + mean_d.square().sum() + excess_q + SUMMATION_ERROR

    def write(self, rows: slice, columns: slice, out_qn: Tensor) -> None:
        """Write the bounds of some queries and scenes into a buffer."""
        queries_qd, archive_dn = self._queries.values_nd[rows], self._archive.values_nd[columns].T
        if queries_qd.dtype == torch.int8:
            products_qn = out_qn.view(torch.int32)
            out_qn.copy_(torch._int_mm(queries_qd, archive_dn, out=products_qn))
        else:
            out_qn.copy_(queries_qd @ archive_dn)
        out_qn.add_(self._scene_margins_n[columns])

    def threshold(self, rows: slice, similarity_q: Tensor) -> Tensor:
        """The bound below which a scene is less similar than ``similarity_q``, for each of some queries."""
        return (similarity_q - self._query_margins_q[rows]) / self._unit

    def topk_candidates(
        self, rows: slice, tile: slice, k: int, kth_best_q: Tensor | None, buffer: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Compute the similarities of a tile's candidates.

        Args:
            rows: Queries.
            tile: Scenes of the block.
            k: Scenes to retrieve.
            kth_best_q: Similarity of each query's k-th best scene so far; None if there are fewer.
            buffer: Memory for the bounds.

        Returns:
            Scores and indices within the tile (Q, candidates), padded with scores of -inf; None if there are too many
            candidates.
        """
        queries_qd, scenes_nd = self._queries.features_nd[rows], self._archive.features_nd[tile]
        bound_qn = buffer[: len(queries_qd) * len(scenes_nd)].view(len(queries_qd), -1)
        self.write(rows, tile, bound_qn)
        groups = bound_qn.unflatten(1, (-1, GROUP))
        maxima = groups.amax(2)
        if kth_best_q is None:
            kth_best_q = _kth_best_of_likely(queries_qd, scenes_nd, groups, maxima, k)
        threshold = self.threshold(rows, kth_best_q)[:, None]
        row, group = (maxima < threshold).logical_not().nonzero(as_tuple=True)  # keeps NaN, too
        candidate = (groups[row, group] < threshold[row]).logical_not()
        if candidate.count_nonzero() > MAX_CANDIDATES * len(queries_qd):
            return None
        position, member = candidate.nonzero(as_tuple=True)
        row, index = row[position], group[position] * GROUP + member
        counts = torch.bincount(row, minlength=len(queries_qd))
        scores = _similarities(queries_qd, scenes_nd, counts, index)
        return _pad_rows(row, counts, scores, index)


def _kth_best_of_likely(queries_qd: Tensor, scenes_nd: Tensor, groups_qgn: Tensor, maxima_qg: Tensor, k: int) -> Tensor:
    """A similarity that k scenes reach: the smallest one of the k scenes with the highest bounds of their groups."""
    likely = maxima_qg.topk(k, dim=1).indices
    index = likely * GROUP + groups_qgn.take_along_dim(likely[:, :, None], 1).argmax(2)
    counts = torch.full((len(queries_qd),), k)
    scores = _similarities(queries_qd, scenes_nd, counts, index.sort(dim=1).values.flatten())
    return scores.view(-1, k).amin(1)


def _similarities(queries_qd: Tensor, scenes_nd: Tensor, counts_q: Tensor, index: Tensor) -> Tensor:
    """Float32 similarities of each query with ``counts_q`` scenes; ``index`` lists the scenes query by query."""
    ends = torch.cat([counts_q.new_zeros(1), counts_q.cumsum(0)])
    shape = (len(queries_qd), len(scenes_nd))
    pattern = torch.sparse_csr_tensor(ends, index, torch.zeros(len(index)), shape, check_invariants=False)
    similarities: Tensor = torch.sparse.sampled_addmm(pattern, queries_qd, scenes_nd.T, beta=0.0).values()
    return similarities


def _pad_rows(row: Tensor, counts_q: Tensor, scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange scores and indices of ascending rows as (Q, largest count), padded with scores of -inf."""
    column = torch.arange(len(row)) - (counts_q.cumsum(0) - counts_q)[row]
    shape = (len(counts_q), int(counts_q.max()))
    scores_qc, indices_qc = torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.long)
    scores_qc[row, column] = scores
    indices_qc[row, column] = index
    return scores_qc, indices_qc


@cache
def _rotation() -> Tensor:
    """A random rotation, always the same."""
    random = torch.randn(ROTATION, ROTATION, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(random).Q.float()
    return rotation


def _int8_products_are_exact() -> bool:
    """Whether int8 products are exact. If oneDNN must use older instructions, sums of two products overflow."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randint(-LEVELS, LEVELS + 1, (2, 64, 256), generator=random)
    a[0] = b[0] = LEVELS
    return torch.equal(torch._int_mm(a.to(torch.int8), b.to(torch.int8).T), (a @ b.T).int())
