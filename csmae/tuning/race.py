"""The race of the finalists: which one is trained next with a further seed, and how clear the lead is.

A race gives the verdict that a fixed number of seeds for every finalist would give, with fewer trainings. It ends when the
chance that the seeds that are left would make another finalist the champion is at most ``CHANCE`` (stochastic curtailment: Lan,
Simon and Halperin, 1982). Each seed goes to the leader or to the finalist that is likeliest to overtake it, whichever has
fewer (top-two sampling: arXiv 1602.08448, 2206.05979).

All finalists share one variance, estimated from the seeds that each has had. Common seeds, which correlate the scores of two
finalists, only make the race more careful.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from csmae.trials.leaderboard import Leaderboard, LeaderboardEntry, leaderboard
from csmae.trials.store import TrialStore

CHANCE = 0.1
"""Chance of another champion after all seeds at which the race ends; divided among the leader's rivals (Bonferroni)."""


@dataclass(frozen=True)
class Finalist:
    """A configuration that is confirmed."""

    number: int
    """Number of the trial that found it."""
    scores: tuple[float, ...]
    """Score of the trial, then of its confirmations; larger is better."""
    num_running: int = 0
    """Confirmations that are being trained."""
    num_started: int = 0
    """Confirmations that run or ended, failed ones included."""
    num_left: int = 0
    """Seeds with which it may still be trained."""
    is_new: bool = True
    """Whether it is among the best trials now; False for a finalist of an earlier run that no longer is."""

    @property
    def mean(self) -> float:
        """Mean over the seeds so far."""
        return statistics.fmean(self.scores)

    @property
    def num_ahead(self) -> int:
        """Seeds whose scores are not known yet."""
        return self.num_running + self.num_left


def find_finalists(trial_store: TrialStore) -> list[Finalist]:
    """List the finalists of a study that confirms: the best trials by their own scores, then those of earlier runs."""
    confirm, board = trial_store.study.search.confirm, leaderboard(trial_store.optuna_study)
    assert confirm
    new = [trial.number for trial in board.ranked[: confirm.top]]
    entries = {entry.trial.number: entry for entry in board.entries}
    earlier = [number for number, entry in entries.items() if entry.is_finalist and number not in new]
    found = []
    for number in (*new, *earlier):
        trials = trial_store.confirmations(number)
        found.append(
            Finalist(
                number,
                _scores(board, entries[number]),
                num_running=sum(not trial.state.is_finished() for trial in trials),
                num_started=len(trials),
                num_left=max(0, confirm.seeds - len(trials)),
                is_new=number in new,
            )
        )
    return found


def _scores(board: Leaderboard, entry: LeaderboardEntry) -> tuple[float, ...]:
    sign = 1 if board.objectives[board.objective] == "maximize" else -1
    return tuple(sign * score for score in entry.scores)


def next_in_turn(finalists: Sequence[Finalist]) -> int | None:
    """Choose the new finalist with the fewest confirmations, until each has all of its seeds: confirmation without a race."""
    able = [finalist for finalist in finalists if finalist.is_new and finalist.num_left]
    return min(able, key=lambda finalist: finalist.num_started).number if able else None


def next_in_race(finalists: Sequence[Finalist]) -> int | None:
    """Choose the finalist to train with a further seed.

    Every new finalist is trained once before one is trained twice, and none with two seeds at a time. A finalist without rivals
    is trained with all seeds.

    Args:
        finalists: Best first, by the scores of their own trials.

    Returns:
        The finalist's number. None if the race is decided, or depends on confirmations that run.
    """
    untried = [finalist for finalist in finalists if finalist.is_new and finalist.num_left and not finalist.num_started]
    if untried:
        return untried[0].number
    for pair in _undecided_pairs(finalists):
        able = [finalist for finalist in pair if finalist.num_ahead]
        fewest = min(able, key=lambda finalist: (len(finalist.scores) + finalist.num_running, -finalist.num_running))
        if not fewest.num_running:
            return fewest.number
    return None


def _undecided_pairs(finalists: Sequence[Finalist]) -> Iterator[list[Finalist]]:
    """The leader with each rival that may still overtake it, the likeliest first; a leader without rivals alone."""
    leader = max(finalists, key=lambda finalist: finalist.mean, default=None)
    rivals = [finalist for finalist in finalists if finalist is not leader]
    if leader is None:
        return
    if not rivals and leader.num_ahead:
        yield [leader]
    variance, freedom = _variance(finalists)
    chances = [(chance_to_overtake(leader, rival, variance, freedom), rival) for rival in rivals]
    for chance, rival in sorted(chances, key=lambda pair: -pair[0]):
        if chance > CHANCE / len(rivals):
            yield [leader, rival]


def chance_to_overtake(leader: Finalist, rival: Finalist, variance: float, freedom: int) -> float:
    """Chance that a rival's mean is above the leader's once both have been trained with all seeds.

    The mean that a finalist with n of N scores will have is distributed around the present one with the variance of a score
    times 1/n - 1/N, a t distribution if that variance is estimated.

    Args:
        leader: Has the best mean.
        rival: Another finalist.
        variance: Of a finalist's score over seeds.
        freedom: Degrees of freedom of the variance; 0 if it is unknown.
    """
    share = sum(1 / len(f.scores) - 1 / (len(f.scores) + f.num_ahead) for f in (leader, rival))
    if not share:
        return 0.0
    lead = leader.mean - rival.mean
    if not freedom or lead <= 0:
        return 0.5
    if not variance:
        return 0.0
    from scipy.special import stdtr  # takes a moment

    return float(stdtr(freedom, -lead / math.sqrt(variance * share)))


def _variance(finalists: Sequence[Finalist]) -> tuple[float, int]:
    """The variance of a finalist's score over seeds, pooled over all finalists, and its degrees of freedom."""
    freedom = sum(len(finalist.scores) - 1 for finalist in finalists)
    deviations = (score - finalist.mean for finalist in finalists for score in finalist.scores)
    return (math.fsum(d * d for d in deviations) / freedom, freedom) if freedom else (0.0, 0)


def seed_variance(board: Leaderboard) -> tuple[float, int]:
    """Variance of a score over seeds, pooled over all trials that were confirmed, and its degrees of freedom."""
    return _variance([Finalist(entry.trial.number, _scores(board, entry)) for entry in board.entries])


def describe_lead(board: Leaderboard) -> str | None:
    """Say how far the best finalist is ahead of the next one, such as ``leads trial 7 by 0.0120 ± 0.0040 over 3 seeds``.

    The error is the standard error of the difference of their means.

    Returns:
        None if the study does not confirm.
    """
    entries = takewhile(lambda entry: entry.is_finalist, board.entries)
    finalists = [Finalist(entry.trial.number, _scores(board, entry)) for entry in entries]
    if not finalists:
        return None
    (best, *others), (variance, freedom) = finalists, _variance(finalists)
    counts = [len(finalist.scores) for finalist in finalists[:2]]
    error = f" ± {math.sqrt(variance * sum(1 / count for count in counts)):.4f}" if freedom else ""
    seeds = "1 seed: it is not confirmed" if counts[0] == 1 else f"{counts[0]} seeds"
    if not others:
        return f"has a mean of {board.entries[0].mean:.4f}{error} over {seeds}"
    if counts[1] != counts[0] > 1:
        seeds += f", of which trial {others[0].number} had {counts[1]}"
    return f"leads trial {others[0].number} by {best.mean - others[0].mean:.4f}{error} over {seeds}"
