"""Points of a search space as vectors, for models of the score."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from csmae.study.condition import holds
from csmae.study.domain import Domain
from csmae.study.prior import TruncatedNormal
from csmae.study.space import Space
from csmae.study.values import Value, finite_number

Array = NDArray[np.float64]

Point = Mapping[str, Value]
"""Values of the active domains, by dotted name."""

INACTIVE = 0.5
"""In the columns of a domain that is not active: the middle, which is nearest to all values."""


class Encoding:
    """Converts points of a space to vectors in [0, 1] and back.

    A range is one column, logarithmic if the domain is. A value of a stepped range or an integer is the middle of its cell:
    the numbers that round to it. Choices that are numbers, or only two, are one column in their order; others are one-hot.
    A domain with conditions has one more column: 1 where it is active, else 0.

    Args:
        space: The search space.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._axes = {name: _make_axis(domain) for name, domain in space.domains.items()}

    def encode(self, points: Sequence[Point]) -> Array:
        """Encode points.

        Args:
            points: N points; names outside the space are ignored, numbers outside a range are encoded as its nearest end.

        Returns:
            N rows of D columns in [0, 1].

        Raises:
            ValueError: A value is not one of a domain's choices, or is not a number in a range.
        """
        blocks = [np.empty((len(points), 0))]
        for name, axis in self._axes.items():
            values = [point[name] for point in points if name in point]
            if len(values) == len(points):
                active, block = np.ones((len(points), 1)), axis.encode(values)
            else:
                active = np.array([[name in point] for point in points], float)
                block = np.full((len(points), axis.width), INACTIVE)
                block[active[:, 0] == 1] = axis.encode(values)
            blocks += [block, active] if self._space.domains[name].when else [block]
        return np.hstack(blocks)

    def decode(self, vectors: Array) -> list[dict[str, Value]]:
        """Find the points that are encoded nearest to vectors.

        Args:
            vectors: N rows of D columns in [0, 1]. Which domains are active follows from the conditions, not from the columns.
        """
        values: dict[str, list[Value]] = {}
        activity: dict[str, list[bool]] = {}
        start = 0
        for name, axis in self._axes.items():
            domain, base = self._space.domains[name], self._space.base[name]
            decoded = axis.decode(vectors[:, start : start + axis.width])
            start += axis.width + bool(domain.when)
            activity[name] = self._is_active(domain, values, len(vectors))
            values[name] = [value if one else base for value, one in zip(decoded, activity[name], strict=True)]
        rows = zip(zip(*values.values(), strict=True), zip(*activity.values(), strict=True), strict=True)
        return [dict(compress(zip(values, row, strict=True), active)) for row, active in rows]

    def _is_active(self, domain: Domain, values: Mapping[str, list[Value]], num_points: int) -> list[bool]:
        """For each point, whether the domain's conditions hold."""
        active = [True] * num_points
        for name, condition in domain.when.items():
            if name in values:
                active = [one and holds(condition, value) for one, value in zip(active, values[name], strict=True)]
            elif not holds(condition, self._space.base[name]):
                return [False] * num_points
        return active

    def sample(self, num_points: int, random: np.random.Generator, prior_share: float = 1.0) -> list[dict[str, Value]]:
        """Draw points from the priors; domains without a prior are uniform.

        Args:
            num_points: How many.
            random: Decides the points.
            prior_share: Probability with which a point is drawn from the priors; the others are uniform.
        """
        from_prior = (random.random(num_points) < prior_share)[:, None]
        blocks = [np.empty((num_points, 0))]
        for name, axis in self._axes.items():
            block = axis.draw(num_points, random)
            if self._space.domains[name].prior:
                block = np.where(from_prior, axis.draw_from_prior(num_points, random), block)
            blocks.append(block)
            if self._space.domains[name].when:
                blocks.append(np.ones((num_points, 1)))
        return self.decode(np.hstack(blocks))

    def prior_log_density(self, points: Sequence[Point], prior_share: float = 1.0) -> Array:
        """Compare how likely the draws of ``sample`` and uniform draws are; domains that are not active do not count.

        Args:
            points: N points.
            prior_share: As in ``sample``. Below 1, no point is much less likely than among uniform draws.

        Returns:
            N logarithms of the ratio; 0 everywhere without priors.
        """
        total = np.zeros(len(points))
        for name, axis in self._axes.items():
            if self._space.domains[name].prior:
                active = np.array([name in point for point in points], bool)
                total[active] += axis.prior_log_density([point[name] for point in points if name in point])
        return total if prior_share == 1 else np.log(prior_share * np.exp(total) + 1 - prior_share)


def _make_axis(domain: Domain) -> _RangeAxis | _ChoiceAxis:
    return _ChoiceAxis(domain) if isinstance(domain.distribution, CategoricalDistribution) else _RangeAxis(domain)


class _RangeAxis:
    """The column of a range, spaced as Optuna's random sampler draws from it."""

    width = 1

    def __init__(self, domain: Domain) -> None:
        assert isinstance(domain.distribution, FloatDistribution | IntDistribution)
        self._domain, self._low, self._high = domain, domain.distribution.low, domain.distribution.high
        self._log, self._step = domain.distribution.log, domain.distribution.step
        margin = (self._step or 0) / 2
        self._start, end = self._scale(np.array([self._low - margin, self._high + margin]))
        self._length = end - self._start
        self._decoded: dict[float, Value] = {}
        if domain.prior:
            [[center]] = self.encode([domain.fit(domain.prior.center)])
            self._prior = TruncatedNormal(center, domain.prior.width)

    def _scale(self, numbers: Array) -> Array:
        scaled: Array = np.log(numbers) if self._log else numbers
        return scaled

    def _column(self, numbers: Array) -> Array:
        scaled: Array = np.clip((self._scale(numbers) - self._start) / self._length, 0, 1)
        return scaled

    def encode(self, values: Sequence[Value]) -> Array:
        """Return a column in [0, 1] for values of the range."""
        return self._column(self._numbers(values))[:, None]

    def _numbers(self, values: Sequence[Value]) -> Array:
        """Convert values to numbers of the range."""
        numbers = np.array(values, float)  # null becomes nan
        if np.isnan(numbers).any():
            value = next(value for value, number in zip(values, numbers, strict=True) if math.isnan(number))
            raise ValueError(f"{self._domain.name} {value} is outside its domain: {self._domain}")
        clipped: Array = np.clip(numbers, self._low, self._high)
        return clipped

    def decode(self, column: Array) -> list[Value]:
        """Return the values whose cells contain the numbers of a column in [0, 1]."""
        scaled = self._start + self._length * column[:, 0]
        numbers = np.exp(scaled) if self._log else scaled
        if self._step is None:
            decoded: list[Value] = np.clip(numbers, self._low, self._high).tolist()
            return decoded
        steps = np.clip(np.rint((numbers - self._low) / self._step), 0, self._domain.size - 1).tolist()
        for step in set(steps) - self._decoded.keys():
            self._decoded[step] = self._domain.decode(self._low + step * self._step)
        return [self._decoded[step] for step in steps]

    def draw(self, num_points: int, random: np.random.Generator) -> Array:
        """Draw a uniform column."""
        return random.random((num_points, 1))

    def draw_from_prior(self, num_points: int, random: np.random.Generator) -> Array:
        """Draw a column from the prior."""
        return self._prior.draw(num_points, random)[:, None]

    def prior_log_density(self, values: Sequence[Value]) -> Array:
        """Logarithm of the prior's density, of which 1 is uniform."""
        numbers = self._numbers(values)
        if self._step is None:
            return self._prior.log_density(self._column(numbers))
        return self._prior.mean_log_density(
            self._column(numbers - self._step / 2), self._column(numbers + self._step / 2)
        )


class _ChoiceAxis:
    """The columns of a choice."""

    def __init__(self, domain: Domain) -> None:
        self._domain, self._choices = domain, list(domain.ends)
        numbers = [finite_number(choice) for choice in self._choices]
        if ordered := None not in numbers:
            self._choices.sort(key=float)  # type: ignore[arg-type]  # all are numbers
        count = len(self._choices)
        self._indices = {_key(choice): index for index, choice in enumerate(self._choices)}
        self._codes = np.eye(count) if count > 2 and not ordered else np.linspace(0, 1, count)[:, None]
        """The columns of each choice."""
        self.width = self._codes.shape[1]
        if prior := domain.prior:
            self._prior = np.full(count, prior.width / count)
            self._prior[self._find([prior.center])] += 1 - prior.width

    def encode(self, values: Sequence[Value]) -> Array:
        """Return the columns of values."""
        columns: Array = self._codes[self._find(values)]
        return columns

    def _find(self, values: Sequence[Value]) -> list[int]:
        """Return the position of each value among the choices."""
        try:
            return [self._indices[_key(value)] for value in values]
        except KeyError:
            return [self._indices[_key(self._domain.fit(value))] for value in values]

    def decode(self, columns: Array) -> list[Value]:
        """Return the choice of each row: that of the largest of several columns, or that whose cell a number is in."""
        count = len(self._choices)
        if self.width > 1:
            indices = columns.argmax(1)
        else:
            indices = np.clip(np.floor(columns[:, 0] * count), 0, count - 1).astype(int)
        return [self._choices[index] for index in indices.tolist()]

    def draw(self, num_points: int, random: np.random.Generator) -> Array:
        """Draw uniform columns."""
        return self._codes[random.integers(len(self._choices), size=num_points)]

    def draw_from_prior(self, num_points: int, random: np.random.Generator) -> Array:
        """Draw columns from the prior."""
        return self._codes[random.choice(len(self._choices), num_points, p=self._prior)]

    def prior_log_density(self, values: Sequence[Value]) -> Array:
        """Logarithm of the prior's probabilities in relation to equal ones."""
        density: Array = np.log(self._prior[self._find(values)] * len(self._choices))
        return density


def _key(choice: Value) -> Hashable:
    """Identify a choice; true is not 1."""
    if isinstance(choice, list | tuple):
        return tuple(map(_key, choice))
    return (bool, choice) if isinstance(choice, bool) else choice
