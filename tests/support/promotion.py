"""A small strategy that pauses: successive halving of the promotion type (arXiv 1810.05934), for tests of what surrounds it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from csmae.trial_status import TrialStatus
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, Scores, Stop, TrialView


class Promotion:
    """Pauses every trial at each rung; the best third of a rung is promoted, from the highest rung downwards.

    Args:
        epochs: Epochs of the complete training.
        reduction: Ratio of the epochs of consecutive rungs, of which the first is after epoch 1.
        stop_last: Whether the worst paused trials are stopped for good once nothing else is left to do.
    """

    def __init__(self, epochs: int, reduction: int = 3, stop_last: bool = False) -> None:
        self._reduction, self._stop_last = reduction, stop_last
        self._rungs = [reduction**i for i in range(20) if reduction**i < epochs] + [epochs]

    def next(self, trials: Sequence[TrialView], num_new: int) -> Decision | None:
        """Promote, else train a new configuration; when there are none left, take the best paused trial further."""
        for rung, above in reversed(list(zip(self._rungs, self._rungs[1:], strict=False))):
            ranked = sorted(
                (trial for trial in trials if rung in trial.scores),
                key=lambda trial: (-trial.scores[rung][0], trial.number),
            )
            for trial in ranked[: len(ranked) // self._reduction]:
                if trial.status is TrialStatus.PAUSED and trial.trained == rung:
                    return Resume(trial.number, above, f"among the best third of {len(ranked)} trials at epoch {rung}")
        if num_new:
            return NewTrial(self._rungs[0], f"first rung of {self._rungs[0]} epoch")
        paused = [trial for trial in trials if trial.status is TrialStatus.PAUSED]
        if any(trial.status is TrialStatus.COMPLETE for trial in trials):
            return Stop(paused[-1].number, "not among the best") if paused and self._stop_last else None
        if any(trial.status is TrialStatus.RUNNING for trial in trials) or not paused:
            return None
        best = max(paused, key=lambda trial: (max(trial.scores.values(), default=(-math.inf,)), -trial.number))
        return Resume(best.number, self._rungs[-1], "the best trial is trained to its end")

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Stop no trial between two rungs."""
        return True

    def expectation(self, trials: Sequence[TrialView]) -> Mapping[int, float]:
        """Rank by the score at the last rung."""
        return {t.number: list(t.scores.values())[-1][0] for t in trials if t.status is TrialStatus.PAUSED and t.scores}

    def describe(self) -> list[str]:
        """Explain the rungs."""
        return [f"Trials pause after epochs {', '.join(map(str, self._rungs))}; the best third of each is promoted."]
