"""Priors: what an expert expects the best value of a domain to be."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_validator

from csmae.study.values import Scalar, Value

Array = NDArray[np.float64]

WIDTHS = {"low": 0.5, "medium": 0.25, "high": 0.125}
"""Standard deviation in relation to the length of the range; of choices, the share that is spread over all of them.

Source: PriorBand (arXiv 2306.12370), the confidences of its implementation in NePS.
"""

PRIOR_SHARE = 0.5
"""Share of the first points of a search that are drawn from the priors."""

NUM_CELLS = 2048
"""Cells of the table from which values of a range are drawn."""

NUM_MEANS = 16
"""Numbers of an interval whose densities are averaged."""


class Prior(BaseModel):
    """Where an expert expects the best value. It steers which configurations are tried, and excludes none."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    center: Value
    """The expected value; one of the domain's."""
    confidence: Literal["low", "medium", "high"] = "medium"
    """How near the best value is expected: the standard deviation is 0.5, 0.25 or 0.125 of the range, of its logarithm if
    it is drawn on a logarithmic scale. A choice is the center with probability 0.5, 0.75 or 0.875, else any of all."""

    @field_validator("center", mode="before")
    @classmethod
    def _check_center(cls, center: Any) -> Any:
        if not isinstance(center, Scalar | list):
            raise ValueError("must be a value of the domain")
        return center

    @property
    def width(self) -> float:
        """Standard deviation in relation to the length of the range; of choices, the share that is spread over all."""
        return WIDTHS[self.confidence]

    def __str__(self) -> str:
        return f"prior {json.dumps(self.center)} with {self.confidence} confidence"


class TruncatedNormal:
    """A normal distribution, cut at 0 and 1.

    Args:
        center: The mode, in [0, 1].
        width: Standard deviation before the cut.
    """

    def __init__(self, center: float, width: float) -> None:
        self._center, self._width = center, width
        self._grid = np.linspace(0, 1, NUM_CELLS + 1)
        middles = (self._grid[1:] + self._grid[:-1]) / 2
        mass = np.cumsum(np.exp(self._log_kernel(middles)))
        self._cumulative = np.concatenate([[0], mass / mass[-1]])
        self._log_norm = np.log(mass[-1] / NUM_CELLS)

    def _log_kernel(self, numbers: Array) -> Array:
        kernel: Array = -0.5 * ((numbers - self._center) / self._width) ** 2
        return kernel

    def draw(self, count: int, random: np.random.Generator) -> Array:
        """Draw numbers in [0, 1]."""
        return np.interp(random.random(count), self._cumulative, self._grid)

    def log_density(self, numbers: Array) -> Array:
        """Logarithm of the density at numbers in [0, 1]."""
        density: Array = self._log_kernel(numbers) - self._log_norm
        return density

    def mean_log_density(self, starts: Array, ends: Array) -> Array:
        """Logarithm of the mean density of intervals in [0, 1]."""
        numbers = starts[:, None] + (ends - starts)[:, None] * (np.arange(NUM_MEANS) + 0.5) / NUM_MEANS
        density: Array = np.log(np.exp(self.log_density(numbers)).mean(1))
        return density
