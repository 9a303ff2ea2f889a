"""Two methods without any model, with which all others are compared."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator

import numpy as np

from curves.clock import BUDGET, Ending, Piece, Run, improvements
from curves.tables import Floats, Table

NUM_LOOKED_AT, NUM_TRAINED_ON = 100, 3
"""Configurations that ``BestOfFirstEpoch`` trains for an epoch, and how many of them to their end."""


class RandomSearch:
    """Trains random points to their end."""

    def __init__(self, table: Table, seed: int | np.random.SeedSequence) -> None:
        self._table, self._random, self._num = table, np.random.default_rng(seed), 0

    def ask(self) -> Piece:
        """Draw a point."""
        self._num += 1
        return Piece(self._num, self._table.epochs, self._table.point(self._random.random(len(self._table.names))))

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        """Continue."""
        return True

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        """Do nothing."""


class BestOfFirstEpoch:
    """Trains 100 random points for one epoch each, and the best three of them to their end, again and again."""

    def __init__(self, table: Table, seed: int) -> None:
        self._draws, self._epochs = RandomSearch(table, seed), table.epochs
        self._num_drawn, self._num_running = 0, 0
        self._losses: dict[Hashable, float] = {}
        self._best: list[Hashable] = []

    def ask(self) -> Piece | None:
        """Train one of the best on, or draw a point; wait for the last of the first epochs."""
        if self._best:
            return Piece(self._best.pop(0), self._epochs)
        if self._num_drawn < NUM_LOOKED_AT:
            self._num_drawn += 1
            return Piece((piece := self._draws.ask()).key, 1, piece.point)
        return None

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        """Take note of the first epoch's loss."""
        if epoch == 1:
            self._losses[key] = math.inf if math.isnan(loss) else loss
        return True

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        """Choose the best after the last of the first epochs."""
        if epoch == 1 and len(self._losses) == NUM_LOOKED_AT:
            self._best = sorted(self._losses, key=lambda other: self._losses[other])[:NUM_TRAINED_ON]
            self._best = [other for other in self._best if math.isfinite(self._losses[other])]
            self._losses, self._num_drawn = {}, 0


def random_runs(table: Table, workers: int, num: int, seed: int = 0) -> list[Run]:
    """Many random searches; each equals a simulation of ``RandomSearch`` with the same points, and takes a millisecond."""
    seeds = np.random.SeedSequence(seed).spawn(num)
    return [_random_run(table, workers, np.random.default_rng(seed)) for seed in seeds]


def _random_run(table: Table, workers: int, random: np.random.Generator) -> Run:
    end, run = BUDGET * table.epochs // workers, Run()
    free = [(0, worker) for worker in range(workers)]
    rows = _nearest_rows(table, random.random((len(table.points), len(table.names))))
    while free[0][0] < end:
        started, worker = free[0]
        row = next(rows)
        ended = started + int(table.lengths[row])
        heapq.heapreplace(free, (ended, worker))
        run.num_trials += 1
        if ended <= end and math.isfinite(table.finals[row]):
            run.num_finished += 1
            run.improvements.append((ended * workers, int(table.ranks[row])))
    run.improvements = improvements(run.improvements)
    return run


def _nearest_rows(table: Table, units: Floats) -> Iterator[int]:
    """Yield the rows of the nearest unused configurations, one after another."""
    used = np.zeros(len(table.points), dtype=bool)
    for start in range(0, len(units), BUDGET):
        block = units[start : start + BUDGET]
        distances = (table.units**2).sum(axis=1) - 2 * block @ table.units.T
        for row in distances:
            nearest = int(np.where(used, np.inf, row).argmin())
            used[nearest] = True
            yield nearest
