"""One number for a trial's scores at a rung, in relation to all scores of the study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from csmae.trials.pareto import hypervolume_order
from csmae.tuning.strategy.base import Scores
from csmae.tuning.strategy.gaussian_process import Array


def normal_scores(scores: Sequence[Scores], violations: Sequence[float]) -> Array:
    """Replace scores by the normal quantiles of their ranks; larger is better.

    Ranks ignore the scale of an objective, and bad outliers have no influence. Several objectives are ranked by
    non-dominated rank, then by their contribution to the hypervolume. Whatever violates constraints ranks below everything
    that does not, the larger violation lower (Deb's rules, 2000).

    Args:
        scores: N scores of one or several objectives.
        violations: By how much each violates the constraints, >= 0.
    """
    violated = np.asarray(violations) > 0
    ranks = np.empty(len(scores))
    ranks[violated] = rankdata(-np.asarray(violations)[violated])
    feasible = [one for one, bad in zip(scores, violated, strict=True) if not bad]
    if feasible:
        ranks[~violated] = violated.sum() + _ranks(feasible)
    return np.asarray(ndtri((ranks - 0.5) / max(1, len(ranks))))


def _ranks(scores: Sequence[Scores]) -> Array:
    """Ranks from 1 for the worst."""
    if len(scores[0]) == 1:
        return np.asarray(rankdata([score for (score,) in scores]))
    ranks = np.empty(len(scores))
    ranks[hypervolume_order(scores)] = np.arange(len(scores), 0, -1)
    return ranks
