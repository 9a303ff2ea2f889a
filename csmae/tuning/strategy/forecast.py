"""Forecasts of final scores from the scores at rungs, with one model per rung."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csmae.study.encoding import Encoding
from csmae.study.values import Value
from csmae.trial_status import TrialStatus
from csmae.tuning.strategy.base import Scores, TrialView
from csmae.tuning.strategy.gaussian_process import Array, IncrementProcess
from csmae.tuning.strategy.quality import normal_scores

LAST_RUNG = 0.75
"""Rungs before the end lie below this share of the training."""

MIN_GAIN = 0.05
"""Smallest slope that a rung counts with, where information is carried from rung to rung."""


def rung_epochs(first: int, ratio: int, every: int, epochs: int) -> list[int]:
    """Epochs of the rungs, the last one of which is the whole training.

    Args:
        first: Epochs of the first rung.
        ratio: Of the epochs of consecutive rungs.
        every: Epochs from one score to the next; all rungs but the last are multiples of it.
        epochs: Epochs of the longest training.
    """
    rungs: list[int] = []
    length = first
    while (epoch := -(-length // every) * every) < LAST_RUNG * epochs:
        if epoch not in rungs:
            rungs.append(epoch)
        length *= ratio
    return [*rungs, epochs]


@dataclass(frozen=True)
class Outlook:
    """Forecast of final scores for N points; scores are normal quantiles, larger is better."""

    mean: Array
    variance: Array
    """Of what more trials would reveal, without the noise of a training."""
    information: Array
    """Share of a final score's variance that is known after each rung, ascending to 1."""


class RungTable:
    """The trials' scores at the rungs, as normal quantiles of their ranks among all of them.

    Args:
        trials: In the order of their numbers.
        rungs: Epochs of the rungs.
    """

    def __init__(self, trials: Sequence[TrialView], rungs: Sequence[int]) -> None:
        self.levels = np.array([_level(trial, rungs) for trial in trials], int)
        """Index of the highest rung that each trial has reached; -1 for none."""
        cells, scores = [], []
        for row, trial in enumerate(trials):
            for column in range(self.levels[row] + 1):
                if (found := _score_at(trial, rungs[column])) is not None:
                    cells.append((row, column))
                    scores.append(found)
        self.scores = np.full((len(trials), len(rungs)), np.nan)
        """(trials, rungs), larger is better; NaN where a trial has no score."""
        if cells:
            rows, columns = np.array(cells).T
            self.scores[rows, columns] = normal_scores(scores, [trials[row].violation for row in rows])
            self._count_failures(trials)

    def _count_failures(self, trials: Sequence[TrialView]) -> None:
        """Give a trial that failed the worst score at the rung that it did not reach."""
        worst = np.nanmin(self.scores)
        for row, trial in enumerate(trials):
            below = self.levels[row]
            if trial.status is TrialStatus.FAIL and below + 1 < self.scores.shape[1]:
                self.scores[row, below + 1] = worst

    @property
    def num_scores(self) -> int:
        """Number of scores."""
        return int(np.isfinite(self.scores).sum())

    def last(self, rows: NDArray[np.intp]) -> Array:
        """Scores of trials at the highest rung that each has reached."""
        return np.asarray(self.scores[rows, self.levels[rows]])


def _level(trial: TrialView, rungs: Sequence[int]) -> int:
    reached = [index for index, epoch in enumerate(rungs) if trial.trained >= min(epoch, trial.epochs)]
    return max(reached, default=-1) if trial.scores else -1


def _score_at(trial: TrialView, epoch: int) -> Scores | None:
    """The last scores up to an epoch; training that is shorter counts with its result."""
    known = [one for one in trial.scores if one <= epoch]
    return trial.scores[known[-1]] if known else None


class Forecaster:
    """Predicts final scores: the score at each rung from that at the rung below and the configuration.

    Each rung has a Gaussian process, and their predictions are chained, as in a linear multi-fidelity model (Kennedy and
    O'Hagan, 2000). Where early scores say little about later ones, the fitted slopes are small, and configurations
    decide.

    Args:
        encoding: Of the search space.
        rungs: Epochs of the rungs.
    """

    def __init__(self, encoding: Encoding, rungs: Sequence[int]) -> None:
        self._encoding, self._num_rungs = encoding, len(rungs)
        self._processes: list[IncrementProcess] = []
        self._encoded: dict[int, Array] = {}

    def fit(self, trials: Sequence[TrialView], table: RungTable) -> None:
        """Condition on the scores of all trials."""
        self.vectors = self._encode_trials(trials)
        if not self._processes:
            columns = self.vectors.shape[1]
            self._processes = [IncrementProcess(columns, rung == 0) for rung in range(self._num_rungs)]
        for rung, process in enumerate(self._processes):
            below = table.scores[:, max(0, rung - 1)]
            known = np.isfinite(table.scores[:, rung]) & np.isfinite(below)
            process.fit(self.vectors[known], below[known], table.scores[known, rung])

    def _encode_trials(self, trials: Sequence[TrialView]) -> Array:
        """Encode the trials' points; those that the space does not contain, such as old ones, by the nearest values."""
        new = [trial for trial in trials if trial.number not in self._encoded]
        if new:
            vectors = self._encoding.encode([trial.point for trial in new])
            self._encoded |= {trial.number: vector for trial, vector in zip(new, vectors, strict=True)}
        return np.array([self._encoded[trial.number] for trial in trials])

    def encode(self, points: Sequence[dict[str, Value]]) -> Array:
        """Encode points of the space."""
        return self._encoding.encode(points)

    def of_trials(self, table: RungTable, rows: NDArray[np.intp]) -> Outlook:
        """Forecast trials that have reached a rung."""
        return self._chain(self.vectors[rows], table.last(rows), table.levels[rows])

    def of_points(self, vectors: Array) -> Outlook:
        """Forecast points that no trial has."""
        return self._chain(vectors, np.zeros(len(vectors)), np.full(len(vectors), -1))

    def similarity(self, one: Array, other: Array) -> Array:
        """Correlation of the first rung's scores at the rows of two arrays."""
        return self._processes[0].similarity(one, other)

    def _chain(self, vectors: Array, scores: Array, levels: NDArray[np.intp]) -> Outlook:
        shape, mean = (len(vectors), self._num_rungs), scores.copy()
        unknown, noise, slopes = np.zeros(shape), np.zeros(shape), np.ones(shape)
        for rung, process in enumerate(self._processes):
            ahead = levels < rung
            if ahead.any():
                prediction = process.predict(vectors[ahead], mean[ahead])
                mean[ahead] = prediction.mean
                unknown[ahead, rung], noise[ahead, rung] = prediction.variance, prediction.noise
                slopes[ahead, rung] = prediction.slope
        gains = np.ones(shape)
        for rung in range(self._num_rungs - 2, -1, -1):
            gains[:, rung] = gains[:, rung + 1] * np.maximum(slopes[:, rung + 1], MIN_GAIN)
        known = np.cumsum(((unknown + noise) * gains**2).mean(0))
        return Outlook(mean, (unknown * gains**2).sum(1), known / max(known[-1], 1e-12))
