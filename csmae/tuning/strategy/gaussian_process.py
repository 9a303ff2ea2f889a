"""A Gaussian process of what the training up to a rung adds to a trial's score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

Array = NDArray[np.float64]

JITTER = 1e-8

CONSTANT_VARIANCE = 1.0
"""Variance of the mean increment."""

SLOPE_VARIANCE = 0.25
"""Variance of the slope on the score at the rung below; its mean is 1."""

LENGTH_SCALE = 0.6
"""Length scale over the root of the number of columns: distances grow with it (arXiv 2402.02229)."""

FIRST_AMPLITUDE, FIRST_NOISE = 0.7, 0.1
"""Variance of g and of the noise at the first rung."""

AMPLITUDE, NOISE = 0.1, 0.05
"""Variance of g and of the noise at the other rungs."""

MAX_TRIALS = 220
"""Trials that a prediction uses at most: the better half of them are the best."""


@dataclass(frozen=True)
class Prediction:
    """Prediction of the score at a rung, for N points."""

    mean: Array
    variance: Array
    """Of what more trials would reveal, without the noise."""
    noise: float
    """Variance of what differs between two trainings of the same point."""
    slope: float
    """By how much a difference at the rung below changes the score."""


class IncrementProcess:
    """Models the score at a rung: y = y_below + c + s · y_below + g(x) + noise.

    c and s have normal priors, g is a Gaussian process with a Matérn 5/2 kernel (Rasmussen and Williams, 2006, chapter 2.7).
    The hyperparameters are fixed: scores are normal quantiles of ranks, so their scale is known, and length scales that were
    fitted to the few trials at a rung made simulated searches slower.

    Args:
        num_columns: Columns of x.
        is_first: Whether this is the first rung.
    """

    def __init__(self, num_columns: int, is_first: bool) -> None:
        self._is_first = is_first
        self._amplitude, self.noise = (FIRST_AMPLITUDE, FIRST_NOISE) if is_first else (AMPLITUDE, NOISE)
        self._length = LENGTH_SCALE * math.sqrt(num_columns)
        self._x, self._below, self._num = np.empty((0, num_columns)), np.empty(0), 0

    def fit(self, x: Array, below: Array, y: Array) -> None:
        """Condition on trials.

        Args:
            x: (N, columns), in the order of the trials' numbers.
            below: (N,) scores at the rung below; not used at the first rung.
            y: (N,) scores at this rung.
        """
        below = np.zeros(len(y)) if self._is_first else below
        if len(y) > MAX_TRIALS:
            kept = _spread(y, MAX_TRIALS)
            x, below, y = x[kept], below[kept], y[kept]
        self._x, self._below, self._num = x, below, len(y)
        if len(y):
            covariance = self._kernel(x, below, x, below)
            covariance[np.diag_indices(len(y))] += self.noise + JITTER
            self._factor = np.linalg.cholesky(covariance)
            self._weights = cho_solve((self._factor, True), y - below, check_finite=False)

    def predict(self, x: Array, below: Array) -> Prediction:
        """Predict the scores at this rung from those at the rung below."""
        below = np.zeros(len(x)) if self._is_first else below
        variance = self._amplitude + CONSTANT_VARIANCE + self._slope_variance * below**2
        if not self._num:
            return Prediction(below, variance, self.noise, 1.0)
        cross = self._kernel(x, below, self._x, self._below)
        solved = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
        variance = np.maximum(variance - np.einsum("ij,ij->j", solved, solved), 1e-9)
        slope = 1 + self._slope_variance * float(self._below @ self._weights)
        return Prediction(below + cross @ self._weights, variance, self.noise, slope)

    def similarity(self, one: Array, other: Array) -> Array:
        """Correlation of g between the rows of two arrays."""
        return _matern(_distances(one / self._length, other / self._length))

    @property
    def _slope_variance(self) -> float:
        return 0.0 if self._is_first else SLOPE_VARIANCE

    def _kernel(self, x: Array, below: Array, other_x: Array, other_below: Array) -> Array:
        kernel: Array = self._amplitude * self.similarity(x, other_x) + CONSTANT_VARIANCE
        return kernel if self._is_first else kernel + SLOPE_VARIANCE * np.outer(below, other_below)


def _spread(y: Array, count: int) -> NDArray[np.intp]:
    """Indices of the best ``count / 2`` trials and of as many others, evenly spread by rank; in ascending order."""
    order, best = np.argsort(-y, kind="stable"), count // 2
    others = order[best:][np.linspace(0, len(y) - best - 1, count - best).astype(int)]
    return np.asarray(np.sort(np.concatenate([order[:best], others])))


def _distances(one: Array, other: Array) -> Array:
    """Distances of the rows of two arrays."""
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _matern(distances: Array) -> Array:
    """Matérn 5/2 correlation."""
    root = math.sqrt(5) * distances
    return np.asarray((1 + root + root**2 / 3) * np.exp(-root))
