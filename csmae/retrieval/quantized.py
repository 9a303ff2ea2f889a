"""Bounds on cosine similarities from rough products, which some processors form two to four times as fast as float32's.

Q queries, N scenes of an archive's block, D width. A feature x is taken less the mean m of the queries, rotated and rounded:
``q·a = (q-m)·(a-m) + (q-m)·m + (a-m)·m + m·m``. What rounding took is known for each, so by Cauchy and Schwarz the first
product is off by the query's error times the scene's norm and the rounded query's norm times the scene's error at most.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVELS = 127
"""Largest byte."""
CUT = 4.0
"""Root mean squares that the largest byte stands for. What is larger is cut off, which the errors tell."""
SPIN = 64
"""Neighbouring values that are rotated into each other: a channel that is always large is spread over them."""
CHUNK = 1024
"""Features that are roughened at once, in a thread's cache."""
SUM_ERROR = 5e-5
"""More than what adding up a thousand products of L2-normalised features in float32 can be wrong by."""
PRODUCT_ERROR = 2.0**-9
"""Half of what rounding a product to bfloat16 can take, relatively: it is counted with both factors."""
TINY = 1e-12
"""Scale of features that are all the same."""


class Quantized(NamedTuple):
    """Features less the queries' mean, rounded."""

    values_nd: Tensor
    """The last dimension is filled up with zeros."""
    scale: float
    """What one counts in them."""
    norms: Tensor
    """Before rounding."""
    errors: Tensor
    """Norms of what rounding took."""
    leads: Tensor
    """Products with the mean."""


@cache
def kinds() -> tuple[torch.dtype, ...]:
    """Numbers that this processor multiplies faster than float32, the fastest and coarsest first."""
    able = torch.cpu.get_capabilities()
    instructions = {torch.int8: ("avx512_vnni", "amx_int8"), torch.bfloat16: ("avx512_bf16", "amx_bf16")}
    found = [kind for kind, names in instructions.items() if any(able.get(name) for name in names)]
    return tuple(kind for kind in found if kind != torch.int8 or _is_exact())


def _is_exact() -> bool:
    """Whether products of bytes are right. Where oneDNN is told to use older instructions, sums of two overflow."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randint(-LEVELS, LEVELS + 1, (2, 64, 256), generator=random)
    a[0] = b[0] = LEVELS
    return torch.equal(torch._int_mm(a.to(torch.int8), b.to(torch.int8).T), (a @ b.T).int())


def quantize(features_nd: Tensor, mean_d: Tensor, kind: torch.dtype, threads: Executor) -> Quantized:
    """Features as numbers of a kind, bytes all in one scale."""
    sample = features_nd[:: -(-len(features_nd) // CHUNK)] - mean_d
    scale = max(TINY, CUT / LEVELS * float(sample.square().mean().sqrt())) if kind == torch.int8 else 1.0

    def work(piece_nd: Tensor) -> tuple[Tensor, ...]:
        centred = piece_nd - mean_d
        norms = centred.norm(dim=1)
        if kind == torch.int8:
            spun = pad(centred, (0, -len(mean_d) % SPIN)).unflatten(1, (-1, SPIN)).matmul(_rotation()).flatten(1)
            rounded = (spun / scale).round_().clamp_(-LEVELS, LEVELS)
            errors = spun.sub_(rounded, alpha=scale).norm(dim=1)
        else:
            rounded = centred.to(kind)
            errors = (centred - rounded).norm(dim=1) + PRODUCT_ERROR * norms
        return rounded.to(kind), norms, errors, centred @ mean_d

    columns = zip(*threads.map(work, features_nd.split(CHUNK)), strict=True)
    values_nd, norms, errors, leads = (torch.cat(column) for column in columns)
    return Quantized(values_nd, scale, norms, errors, leads)


@cache
def _rotation() -> Tensor:
    """Random, the same every time."""
    random = torch.randn(SPIN, SPIN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(random).Q.float()
    return rotation


class Bounds:
    """What similarities can be at most, in a unit of their own that keeps each query's order.

    What rounding takes from a typical query is counted with the scenes, what it takes more from an odd one with that query.
    So damaged images, far from all others, spoil no bounds but their own; what is no number spoils all, and bounds no more.

    Args:
        queries: All of them.
        mean_d: Their mean, which was taken from both.
        archive: The block's scenes.
    """

    def __init__(self, queries: Quantized, mean_d: Tensor, archive: Quantized) -> None:
        self._queries_qd, self._archive_nd = queries.values_nd, archive.values_nd
        self._unit = queries.scale * archive.scale
        lengths = queries.norms + queries.errors
        length, error = lengths.median(), queries.errors.median()
        self._most_n = (archive.leads + length * archive.errors + error * archive.norms) / self._unit
        odd_q = (lengths - length).relu() * archive.errors.max() + (queries.errors - error).relu() * archive.norms.max()
        self._given_q = queries.leads + mean_d.square().sum() + odd_q + SUM_ERROR

    def fill(self, rows: slice, columns: slice, memory_qn: Tensor) -> None:
        """The bounds of some queries and scenes."""
        queries_qd, archive_dn = self._queries_qd[rows], self._archive_nd[columns].T
        if queries_qd.dtype == torch.int8:
            whole_qn = memory_qn.view(torch.int32)
            memory_qn.copy_(torch._int_mm(queries_qd, archive_dn, out=whole_qn))
        else:
            memory_qn.copy_(queries_qd @ archive_dn)
        memory_qn.add_(self._most_n[columns])

    def least(self, rows: slice, similarity_q: Tensor) -> Tensor:
        """What has a lower bound than this is less similar, for each of some queries."""
        return (similarity_q - self._given_q[rows]) / self._unit
