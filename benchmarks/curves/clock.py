"""A simulated clock: asynchronous workers train the configurations of a table, one epoch per unit of time."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

from curves.tables import Table

BUDGET = 30
"""Budget of a search, in complete trainings."""


@dataclass(frozen=True)
class Piece:
    """A piece of training that a worker shall do: of a new trial, or of one that was paused."""

    key: Hashable
    """Identifies the trial."""
    until: int
    """Epoch after which the trial pauses."""
    point: Mapping[str, float] | None = None
    """Hyperparameters of a new trial; None for a paused one."""


class Ending(Enum):
    """How a piece of training ended."""

    FINISHED = "finished"
    """After the last epoch of a complete training."""
    PAUSED = "paused"
    """After the epoch ``until``."""
    STOPPED = "stopped"
    """The method did not let it continue; the trial may be resumed all the same."""
    DIVERGED = "diverged"
    """The loss was NaN; the trial cannot be resumed."""


class Method(Protocol):
    """A search method, ours or a rival's."""

    def ask(self) -> Piece | None:
        """Return what a free worker does next; None if it must wait for a report. If no worker trains, that is the end."""

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        """Take the loss after an epoch, NaN if the training diverged, and return whether the trial continues."""

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        """Take note that a piece ended after an epoch. Called after ``report``."""


@dataclass
class Run:
    """What a search did, in a form that JSON can hold."""

    improvements: list[tuple[int, int]] = field(default_factory=list)
    """Epochs spent and rank in the table, for each fully trained configuration that was better than all before."""
    num_trials: int = 0
    """Configurations that were trained for at least an epoch."""
    num_finished: int = 0
    """Configurations that were fully trained."""
    num_decisions: int = 0
    """Pieces of training that the method decided on."""
    decision_s: float = 0.0
    """Seconds that the method took, for all of its decisions and reports together."""
    ms_at_300: float | None = None
    """Milliseconds per decision while there were 275 to 325 trials; None if there were never as many."""


@dataclass
class _Trial:
    row: int
    epoch: int = 0
    until: int = 0
    running: bool = False
    ended: bool = False


class _Stopwatch:
    """Measures what a method takes, in seconds."""

    def __init__(self) -> None:
        self.total_s, self.at_300_s, self.num_at_300 = 0.0, 0.0, 0

    @contextmanager
    def measure(self, num_trials: int, decision: bool = False) -> Iterator[None]:
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.total_s += elapsed
        if 275 <= num_trials <= 325:
            self.at_300_s += elapsed
            self.num_at_300 += decision


class Simulation:
    """One search of a table.

    Args:
        table: The curves.
        method: The search method.
        workers: Number of workers. An epoch spent is one of all workers, idle ones included: ``workers`` per unit of time.
        budget: Epochs to spend; 30 complete trainings by default.
    """

    def __init__(self, table: Table, method: Method, workers: int = 1, budget: int | None = None) -> None:
        self._table, self._method, self._workers = table, method, workers
        self._end = (budget or BUDGET * table.epochs) // workers
        self._used = np.zeros(len(table.points), dtype=bool)
        self._trials: dict[Hashable, _Trial] = {}
        self._events: list[tuple[int, int, Hashable]] = []
        self._num_events, self._idle = 0, workers
        self._run, self._stopwatch = Run(), _Stopwatch()

    def run(self) -> Run:
        """Search until the budget is spent, or the method ends."""
        self._assign(0)
        while self._events and self._events[0][0] <= self._end:
            now, _, key = heapq.heappop(self._events)
            self._train_epoch(now, key)
            self._assign(now)
        watch, run = self._stopwatch, self._run
        run.num_trials, run.decision_s = len(self._trials), round(watch.total_s, 4)
        run.ms_at_300 = round(1000 * watch.at_300_s / watch.num_at_300, 3) if watch.num_at_300 else None
        return run

    def _assign(self, now: int) -> None:
        """Give free workers something to do."""
        while self._idle and now < self._end:
            with self._stopwatch.measure(len(self._trials), decision=True):
                piece = self._method.ask()
            if piece is None:
                return
            self._start(piece)
            self._run.num_decisions += 1
            self._idle -= 1
            self._push(now + 1, piece.key)

    def _start(self, piece: Piece) -> None:
        trial = self._trials.get(piece.key)
        if trial is None:
            assert piece.point is not None, f"{piece.key}: a new trial needs a point"
            trial = self._trials[piece.key] = _Trial(self._table.nearest(piece.point, self._used))
            self._used[trial.row] = True
        assert not trial.running and not trial.ended, f"{piece.key}: cannot be resumed"
        trial.until, trial.running = min(piece.until, self._table.epochs), True
        assert trial.until > trial.epoch, f"{piece.key}: was trained to epoch {trial.epoch}, asked for {piece.until}"

    def _push(self, now: int, key: Hashable) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (now, self._num_events, key))

    def _train_epoch(self, now: int, key: Hashable) -> None:
        trial = self._trials[key]
        loss = float(self._table.losses[trial.row, trial.epoch])
        trial.epoch += 1
        finished = trial.epoch == self._table.epochs
        if finished and not math.isnan(loss):
            self._record(now, trial.row)
        with self._stopwatch.measure(len(self._trials)):
            continues = self._method.report(key, trial.epoch, loss)
            if not math.isnan(loss) and continues and trial.epoch < trial.until:
                self._push(now + 1, key)
                return
            trial.running, trial.ended = False, finished or math.isnan(loss)
            self._idle += 1
            self._method.end(key, trial.epoch, _ending(loss, finished, trial.epoch == trial.until))

    def _record(self, now: int, row: int) -> None:
        self._run.num_finished += 1
        self._run.improvements = improvements(
            [*self._run.improvements, (now * self._workers, int(self._table.ranks[row]))]
        )


def improvements(finished: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Epochs spent and rank of each fully trained configuration that was better than all before, in order of time."""
    best: list[tuple[int, int]] = []
    for spent, rank in sorted(finished):
        if not best or rank < best[-1][1]:
            best.append((spent, rank))
    return best


def _ending(loss: float, finished: bool, paused: bool) -> Ending:
    if math.isnan(loss):
        return Ending.DIVERGED
    if finished:
        return Ending.FINISHED
    return Ending.PAUSED if paused else Ending.STOPPED
