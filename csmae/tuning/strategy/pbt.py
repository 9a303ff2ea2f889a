"""Population based training: members of a population train piece by piece, and bad ones continue as copies of good ones.

Source: Jaderberg et al., Population Based Training of Neural Networks (arXiv 1711.09846).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from csmae.study.encoding import Encoding
from csmae.study.pbt import pbt_interval
from csmae.study.study import Study
from csmae.study.values import Value
from csmae.trial_status import TrialStatus
from csmae.trials.pareto import order
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, Scores, Stop, TrialView
from csmae.tuning.strategy.explore import perturb

MAX_DRAWS = 50
"""Perturbed points that are drawn for a copy."""

ALIVE = (TrialStatus.RUNNING, TrialStatus.PAUSED, TrialStatus.COMPLETE)


class PopulationBased:
    """Trains ``search.num_trials`` members ``pbt.interval`` epochs at a time, those with the fewest epochs first.

    A member that pauses among the worst ``pbt.quantile`` is stopped, and a copy of a member among the best one takes its place:
    a new trial that continues from its parent's checkpoint with perturbed values. There is no barrier: if k of N members have
    a score, the same share of k counts as worst and as best, rounded, so that the first ones are not judged by chance.

    Members that are neither continue at once, the worst are judged as late as possible, and the best continue last,
    because only the checkpoint of a paused trial can be copied.

    Args:
        study: Of which the space, the length of a training and the settings ``search.pbt`` matter.
    """

    def __init__(self, study: Study) -> None:
        self._study, self._encoding = study, Encoding(study.space)
        self._epochs, self._interval = study.max_epochs, pbt_interval(study)

    def next(self, trials: Sequence[TrialView], num_new: int) -> Decision | None:
        """Decide what to train next; see ``Strategy``."""
        if num_new > 0:
            return NewTrial(self._interval, "member of the population")
        population = [trial for trial in trials if trial.status is not TrialStatus.TRANSFERRED]
        for epoch in sorted({trial.trained for trial in population if trial.status is TrialStatus.PAUSED}):
            if decision := self._decide_at(epoch, population):
                return decision
        return None

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Return True: members are judged when they pause."""
        return True

    def expectation(self, trials: Sequence[TrialView]) -> Mapping[int, float]:
        """Share of the trials at its epoch that a paused member beats, by number."""
        paused = [trial for trial in trials if trial.status is TrialStatus.PAUSED]
        expected: dict[int, float] = {}
        for epoch in {trial.trained for trial in paused}:
            ranked = _ranked(trials, epoch, [trial for trial in paused if trial.trained == epoch])
            expected |= {t.number: 1 - place / len(ranked) for place, t in enumerate(ranked) if t in paused}
        return expected

    def describe(self) -> list[str]:
        """Explain the strategy; see ``Strategy``."""
        search, names = self._study.search, ", ".join(self._study.space.domains)
        num_worst = num_replaced(search.num_trials, search.pbt.quantile)
        num_pauses = (self._epochs - 1) // self._interval
        return [
            f"A population of {search.num_trials} trials trains {self._interval} of {self._epochs} epochs at a time.",
            f"At each pause a copy of one of the best {num_worst} replaces each of the worst {num_worst} and goes on with other "
            f"values of {names}: up to {num_worst * num_pauses} copies, which are further trials.",
            f"{search.num_trials * self._epochs} epochs in all, as in {search.num_trials} complete trainings.",
        ]

    def _decide_at(self, epoch: int, population: Sequence[TrialView]) -> Decision | None:
        """Decide on the members that pause at an epoch; None if each must stay paused."""
        paused = [t for t in population if t.status is TrialStatus.PAUSED and t.trained == epoch]
        compared, num_judged = self._epoch_to_compare(epoch, population)
        ranked = _ranked(population, compared, paused)
        places = {trial.number: place for place, trial in enumerate(ranked)}
        best = [t for t in paused if places[t.number] < num_judged]
        worst = [t for t in paused if places[t.number] >= len(places) - num_judged and not t.never_stop]
        if not any(map(_can_be_copied, ranked[:num_judged])):
            worst = []
        reasons = {t.number: f"place {places[t.number] + 1} of {len(places)} at epoch {compared}" for t in paused}
        movable = [t for t in paused if not _is_being_copied(t, population)]
        for trial in movable:
            if trial not in best and trial not in worst:
                return self._resume(trial, reasons)
        for trial in movable:
            if trial in worst:
                return Stop(trial.number, f"{reasons[trial.number]}: a copy of a better one replaces it")
        if _num_vacancies(population) and (copy := self._copy(best, reasons, population)):
            return copy
        return next((self._resume(trial, reasons) for trial in movable if trial in best), None)

    def _epoch_to_compare(self, epoch: int, population: Sequence[TrialView]) -> tuple[int, int]:
        """Choose the epoch by whose scores members that pause at ``epoch`` are compared: the latest of their last piece at which
        enough of the population has a score.

        Returns:
            The epoch, and how many of the trials there count as worst, and as best.
        """
        size = sum(trial.parent is None for trial in population)
        num_scored = Counter(e for t in population for e in t.scores if epoch - self._interval < e <= epoch)
        share = num_replaced(size, self._study.search.pbt.quantile) / size
        num_judged = {e: math.ceil(min(num, size) * share - 0.5) for e, num in num_scored.items()}
        compared = max(num_judged, key=lambda e: (num_judged[e], e), default=epoch)
        return compared, num_judged.get(compared, 0)

    def _resume(self, trial: TrialView, reasons: Mapping[int, str]) -> Resume:
        return Resume(trial.number, self._next_pause(trial), reasons[trial.number])

    def _copy(
        self, best: Sequence[TrialView], reasons: Mapping[int, str], population: Sequence[TrialView]
    ) -> NewTrial | None:
        """Copy one of the best members, at random; None if there is none, or none has a point that was not tried."""
        number = max(trial.number for trial in population) + 1
        random = np.random.default_rng([self._study.search.seed, number])
        for index in random.permutation(len(best)):
            parent = best[index]
            if points := list(self._explore(parent, population, random)):
                reason = f"copy of trial {parent.number}, {reasons[parent.number]}"
                return NewTrial(self._next_pause(parent), reason, iter(points), parent.number)
        return None

    def _next_pause(self, trial: TrialView) -> int:
        return min((trial.trained // self._interval + 1) * self._interval, trial.epochs)

    def _explore(
        self, parent: TrialView, population: Sequence[TrialView], random: np.random.Generator
    ) -> Iterator[dict[str, Value]]:
        """Draw points for a copy that neither its parent nor another copy of it has; none if the space is that small."""
        known = [dict(t.point) for t in population if t.number == parent.number or t.parent == parent.number]
        for _ in range(MAX_DRAWS):
            point = perturb(self._study.space, parent.point, self._encoding.sample(1, random)[0], random)
            if point not in known:
                known.append(point)
                yield point


def num_replaced(size: int, quantile: float) -> int:
    """How many members of a population are replaced at an epoch, at least one; none of a population of one."""
    return max(1, int(size * quantile)) if size > 1 else 0


def _ranked(population: Sequence[TrialView], epoch: int, paused: Sequence[TrialView]) -> list[TrialView]:
    """Order the trials that have a score at an epoch, best first.

    Those that violate constraints follow, then paused trials whose score was not finite.
    """
    scored = [trial for trial in population if epoch in trial.scores]
    feasible = [trial for trial in scored if not trial.violation]
    infeasible = sorted((trial for trial in scored if trial.violation), key=lambda trial: trial.violation)
    ranked = [feasible[index] for index in order([trial.scores[epoch] for trial in feasible])]
    return [*ranked, *infeasible, *(trial for trial in paused if epoch not in trial.scores)]


def _can_be_copied(trial: TrialView) -> bool:
    """Whether a trial is paused, or will pause again."""
    return trial.status is TrialStatus.PAUSED or (trial.status is TrialStatus.RUNNING and trial.until < trial.epochs)


def _is_being_copied(trial: TrialView, population: Sequence[TrialView]) -> bool:
    """Whether a copy of a paused trial has started, but may not have read the checkpoint: it has reported nothing yet."""
    copies = (t for t in population if t.parent == trial.number and t.status is TrialStatus.RUNNING)
    return any(not copy.scores and copy.trained <= trial.trained for copy in copies)


def _num_vacancies(population: Sequence[TrialView]) -> int:
    """Places of members that were stopped or failed and that no copy has taken. A copy that fails is not replaced."""
    taken = sum(t.status in ALIVE or (t.status is TrialStatus.FAIL and t.parent is not None) for t in population)
    return sum(trial.parent is None for trial in population) - taken
