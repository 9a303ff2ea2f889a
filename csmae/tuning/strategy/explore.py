"""How a copy's values differ from its parent's in population based training.

Source: Jaderberg et al. (arXiv 1711.09846), section 4; neighboring choices as in Ray Tune's ``PopulationBasedTraining``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from optuna.distributions import CategoricalDistribution

from csmae.study.domain import Domain
from csmae.study.space import Space
from csmae.study.values import Value, means_same

RESAMPLE_PROBABILITY = 0.25
"""Of each value: it is drawn anew, whatever the parent's value is."""

FACTORS = (0.8, 1.2)
"""One of which multiplies a number otherwise."""


def perturb(
    space: Space, point: Mapping[str, Value], drawn: Mapping[str, Value], random: np.random.Generator
) -> dict[str, Value]:
    """Change the values of a point a little, and some of them altogether.

    Args:
        space: The search space.
        point: The parent's.
        drawn: A random point of the space, whose values replace some of the parent's.
        random: Decides which, and the direction of the other changes.
    """
    values: dict[str, Value] = {}
    for name, domain in space.domains.items():
        if not space.is_active(domain, values):
            continue
        parent = point.get(name, drawn.get(name, domain.ends[0]))
        resampled = name in drawn and random.random() < RESAMPLE_PROBABILITY
        values[name] = drawn[name] if resampled else _step(domain, parent, random.random() < 0.5)
    return values


def _step(domain: Domain, value: Value, up: bool) -> Value:
    """Multiply a number by one of ``FACTORS`` within its range, by at least one step; of choices, take a neighbor."""
    distribution = domain.distribution
    if isinstance(distribution, CategoricalDistribution):
        choices = domain.ends
        index = next(i for i, choice in enumerate(choices) if means_same(choice, value)) + (1 if up else -1)
        return choices[min(max(index, 0), len(choices) - 1)]
    assert isinstance(value, int | float)
    number = value * FACTORS[up]
    if distribution.step is not None:
        steps = [round((n - distribution.low) / distribution.step) for n in (value, number)]
        moved = max(steps[1], steps[0] + 1) if up else min(steps[1], steps[0] - 1)
        number = distribution.low + moved * distribution.step
    return domain.decode(min(max(number, distribution.low), distribution.high))
