"""Orders results: by value, with several objectives by Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csmae.trials.optuna_private import hypervolume


def as_scores(values: Sequence[float], signs: Sequence[int]) -> tuple[float, ...]:
    """Turn objectives into scores, of which larger is better.

    Args:
        values: One per objective.
        signs: For each, 1 if larger is better, else -1.
    """
    return tuple(sign * value for sign, value in zip(signs, values, strict=True))


def pareto_ranks(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Compute the non-dominated rank of each result, larger scores being better: 0 if no other result dominates it.

    Source: NSGA-II (Deb et al., 2002), section III.
    """
    dominates = _dominates(np.asarray(scores, dtype=float))
    above = dominates.sum(axis=0)
    ranks = np.full(len(above), -1)
    rank = 0
    while (ranks < 0).any():
        front = (ranks < 0) & (above == 0)
        ranks[front] = rank
        above -= dominates[front].sum(axis=0)
        rank += 1
    return ranks


def on_pareto_front(scores: Sequence[Sequence[float]]) -> list[bool]:
    """Return for each result whether no other one is better: with one objective the largest, with several the first front."""
    points = np.asarray(scores, dtype=float)
    if not scores or points.shape[1] == 1:
        return [bool(value == points.max()) for value in points.ravel()]
    return [bool(alone) for alone in ~np.any(_dominates(points), axis=0)]


def _dominates(points: np.ndarray) -> np.ndarray:
    """Whether the row's point is at least as large as the column's in all objectives and larger in one."""
    smaller = np.zeros((len(points),) * 2, dtype=bool)
    larger = np.zeros_like(smaller)
    for column in points.T:  # one objective at a time, to avoid an array of pairs by objectives
        smaller |= column[:, None] < column
        larger |= column[:, None] > column
    return larger & ~smaller


def crowding_distance(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Compute how isolated each result is on its front; infinite at the ends. Source: NSGA-II, section III-B."""
    points = np.asarray(scores, dtype=float).reshape(len(scores), -1)
    distance = np.zeros(len(points))
    for column in points.T:
        by_value = np.argsort(column, kind="stable")
        span = column[by_value[-1]] - column[by_value[0]]
        distance[by_value[[0, -1]]] = np.inf
        if span > 0:
            distance[by_value[1:-1]] += (column[by_value[2:]] - column[by_value[:-2]]) / span
    return distance


def order(scores: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the results, best first: by front, and within a front by the first objective."""
    single = not scores or len(scores[0]) == 1
    ranks = [0] * len(scores) if single else pareto_ranks(scores).tolist()
    return sorted(range(len(scores)), key=lambda index: (ranks[index], -scores[index][0]))


def hypervolume_order(scores: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the results, best first: by front, and within a front by what each adds to its front's hypervolume.

    Objectives count relative to their ranges over all results; the reference point lies a tenth of the range below the worst.
    Source: SMS-EMOA (Beume et al., 2007).
    """
    points = np.asarray(scores, dtype=float)
    low, span = points.min(0), np.ptp(points, axis=0)
    losses = 1 - (points - low) / np.where(span > 0, span, 1)
    ranks, reference = pareto_ranks(scores), np.full(points.shape[1], 1.1)
    added = np.empty(len(points))
    for rank in range(ranks.max() + 1):
        front = np.flatnonzero(ranks == rank)
        total = hypervolume(losses[front], reference)
        for index in front:
            added[index] = total - hypervolume(losses[front[front != index]], reference) if len(front) > 1 else total
    return sorted(range(len(points)), key=lambda index: (ranks[index], -added[index]))


def num_better(scores: Sequence[Sequence[float]], index: int) -> int:
    """Count the results that are better than one: those of a better front, and the more isolated ones of its own front.

    With one objective, those with a larger score.
    """
    if len(scores[index]) == 1:
        return int((np.asarray(scores)[:, 0] > scores[index][0]).sum())
    ranks = pareto_ranks(scores)
    mates = np.flatnonzero(ranks == ranks[index])
    isolation = crowding_distance([scores[int(mate)] for mate in mates])
    own = isolation[mates == index][0]
    return int((ranks < ranks[index]).sum() + (isolation > own).sum())
