"""Points that come from the priors instead of the sampler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csmae.study.encoding import Encoding, Point
from csmae.study.prior import PRIOR_SHARE
from csmae.study.space import Space
from csmae.study.study import Study
from csmae.study.values import Value


def draw_from_priors(study: Study, tried: Sequence[Point]) -> dict[str, Value] | None:
    """Draw a point from the priors, or leave it to the sampler.

    The centers of the priors come first. Then half of the first ``startup_trials`` points are drawn from the priors, and later
    a share that falls with the square of the number of points: a wrong prior costs about ``startup_trials`` points on
    average, however long the search is.

    Args:
        study: Its seed decides the point.
        tried: Points of all earlier trials and rejected proposals.

    Returns:
        The point; None if the sampler proposes it.
    """
    if not study.space.has_priors:
        return None
    if (center := study.space.prior_center()) not in tried:
        return center
    share = PRIOR_SHARE * min(1.0, study.search.startup_trials / max(1, len(tried))) ** 2
    random = np.random.default_rng([study.search.seed, len(tried)])
    return Encoding(study.space).sample(1, random)[0] if random.random() < share else None


def order_by_priors(space: Space, points: Sequence[Point], seed: int) -> list[int]:
    """Order points at random, such that each is as likely to be the next as if half of the draws were from the priors.

    Returns:
        Their positions in ``points``.
    """
    density = Encoding(space).prior_log_density(points, PRIOR_SHARE)
    noise = np.random.default_rng(seed).gumbel(size=len(points))  # the order of weighted draws without replacement
    order: list[int] = np.argsort(-(density + noise)).tolist()
    return order
