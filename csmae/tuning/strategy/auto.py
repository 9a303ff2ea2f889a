"""The default strategy: trials pause at rungs, a model forecasts their final scores, and the promising ones continue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from csmae.study.encoding import Encoding
from csmae.study.prior import PRIOR_SHARE
from csmae.study.study import Study
from csmae.study.values import Value
from csmae.trial_status import TrialStatus
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, Scores, TrialView
from csmae.tuning.strategy.forecast import Forecaster, Outlook, RungTable, rung_epochs
from csmae.tuning.strategy.gaussian_process import Array

NUM_FIRST = 4
"""Trials before the model proposes configurations; they pause at the second rung, so that it sees two rungs."""

NUM_CAUTIOUS = 20
"""Trials before a first rung beyond the second one is chosen."""

FINISH_EVERY = 4.0
"""Complete trainings' worth of epochs in which at least one trial is trained to its end."""

RANDOM_SHARE = 0.1
"""Share of the new configurations that are drawn at random, in case the model is wrong."""

NUM_DRAWN, NUM_NEAR, NUM_BEST = 150, 50, 5
"""Candidates for a new configuration: random ones, and changes of the trials with the best forecasts."""

STEPS = (0.05, 0.1, 0.2)
"""Standard deviations of the changes, in shares of a domain."""

NUM_COSTED = 10
"""Best candidates whose cost is computed."""

PRIOR_WEIGHT = 1.0
"""Weight of the log density of draws with priors, over the number of trials (πBO, arXiv 2204.11051)."""

Point = Mapping[str, Value]


class AutoStrategy:
    """Trains every configuration to its first rung, and continues the best of each rung from the highest one down.

    Nothing is stopped for good: a trial that pauses is compared again whenever others reach its rung, as in asynchronous
    successive halving with promotion (arXiv 1810.05934). Trials are ranked by their score and by the forecast of their
    final score. New configurations maximize a Thompson sample of that forecast. The first rung is where an epoch reveals
    the most about the final score. Now and then the trial with the best forecast is trained to its end.

    Args:
        study: With the space and the settings.
        epoch_cost: Returns the cost of an epoch of a point, in relation to the base's; None if the point is invalid.
    """

    def __init__(self, study: Study, epoch_cost: Callable[[Point], float | None]) -> None:
        self._study, self._search, self._epoch_cost = study, study.search, epoch_cost
        every, first = int(study.space.base["eval.every"]), study.search.grace_epochs or 1
        self._rungs = rung_epochs(first, study.search.reduction, every, study.max_epochs)
        self._encoding = Encoding(study.space)
        self._forecaster = Forecaster(self._encoding, self._rungs)

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Never stop a trial: assignments end at rungs."""
        return True

    def next(self, trials: Sequence[TrialView], num_new: int) -> Decision | None:
        """Finish a trial if it is time, else continue the best of a rung, else train a new configuration."""
        table = RungTable(trials, self._rungs)
        if num_new and (len(trials) < NUM_FIRST or table.num_scores < NUM_FIRST):
            return self._first(trials)
        forecasts = self._forecast(trials, table)
        paused = [row for row, trial in enumerate(trials) if trial.status is TrialStatus.PAUSED]
        return (
            self._finish(trials, paused, forecasts)
            or self._promote(trials, paused, table, forecasts)
            or (
                self._new(trials, table, forecasts, num_new)
                if num_new
                else self._conclude(trials, paused, table, forecasts)
            )
        )

    def expectation(self, trials: Sequence[TrialView]) -> Mapping[int, float]:
        """Forecasts of the paused trials' final scores."""
        forecasts = self._forecast(trials, RungTable(trials, self._rungs))
        return {
            trial.number: float(forecast)
            for trial, forecast in zip(trials, forecasts, strict=True)
            if trial.status is TrialStatus.PAUSED
        }

    def _forecast(self, trials: Sequence[TrialView], table: RungTable) -> Array:
        """Forecasts of all trials' final scores; minus infinity for those that failed or have no score."""
        forecasts = np.full(len(trials), -np.inf)
        scored = np.isfinite(table.scores[np.arange(len(trials)), table.levels]) & (table.levels >= 0)
        rows = np.flatnonzero(scored & [trial.status is not TrialStatus.FAIL for trial in trials])
        if len(rows):
            self._forecaster.fit(trials, table)
            forecasts[rows] = self._forecaster.of_trials(table, rows).mean
        return forecasts

    # Continuing paused trials.

    def _finish(self, trials: Sequence[TrialView], paused: list[int], forecasts: Array) -> Resume | None:
        """Train the best paused trial to its end, if too few trials are or will be complete for the epochs trained."""
        trained = sum(trial.trained for trial in trials if trial.status is not TrialStatus.TRANSFERRED)
        complete = sum(
            trial.trained == trial.epochs or (trial.status is TrialStatus.RUNNING and trial.until >= trial.epochs)
            for trial in trials
            if trial.status is not TrialStatus.TRANSFERRED
        )
        due = math.floor(trained / self._rungs[-1] / FINISH_EVERY + 0.5)
        if not paused or complete >= due:
            return None
        best = trials[max(paused, key=lambda row: forecasts[row])]
        return Resume(best.number, best.epochs, f"best forecast of {len(paused)} paused trials, trained to the end")

    def _promote(
        self, trials: Sequence[TrialView], paused: list[int], table: RungTable, forecasts: Array
    ) -> Resume | None:
        """Continue a trial that is among the best 1/reduction at its rung; the highest rung comes first."""
        for level in range(len(self._rungs) - 2, -1, -1):
            reached = np.flatnonzero((table.levels >= level) & np.isfinite(forecasts))
            ranks = _ranks(forecasts[reached]) + _ranks(table.scores[reached, level])
            best = reached[np.argsort(ranks, kind="stable")][: len(reached) // self._search.reduction]
            for place, row in enumerate(best, 1):
                if table.levels[row] == level and row in paused:
                    return self._resume(trials[row], level, f"number {place} of {len(reached)} trials at epoch")
        return None

    def _conclude(
        self, trials: Sequence[TrialView], paused: list[int], table: RungTable, forecasts: Array
    ) -> Resume | None:
        """Without further new configurations, continue trials whose forecast is better than that of all complete ones."""
        complete = [forecasts[row] for row, trial in enumerate(trials) if trial.status is TrialStatus.COMPLETE]
        best = max(paused, key=lambda row: forecasts[row], default=None)
        if best is None or (complete and forecasts[best] <= max(complete)):
            return None
        return self._resume(trials[best], table.levels[best], "best forecast after all configurations, at epoch")

    def _resume(self, trial: TrialView, level: int, reason: str) -> Resume:
        until = min(self._rungs[min(level + 1, len(self._rungs) - 1)], trial.epochs)
        return Resume(trial.number, until, f"{reason} {trial.trained}")

    # New configurations.

    def _first(self, trials: Sequence[TrialView]) -> NewTrial:
        until, center = self._rungs[min(1, len(self._rungs) - 1)], self._study.space.prior_center()
        if self._samples:
            return NewTrial(until, "one of the first configurations")
        if self._study.space.has_priors and center not in [trial.point for trial in trials]:
            return NewTrial(until, "the centers of the priors", iter([center, *self._draw(trials)]))
        return NewTrial(until, "one of the first configurations", iter(self._draw(trials)))

    def _draw(self, trials: Sequence[TrialView]) -> list[dict[str, Value]]:
        return self._encoding.sample(NUM_DRAWN, self._random(trials), PRIOR_SHARE)

    @property
    def _samples(self) -> bool:
        """Whether a sampler of Optuna proposes the configurations."""
        return self._search.sampler != "auto"

    def _random(self, trials: Sequence[TrialView]) -> np.random.Generator:
        """A generator for one decision."""
        return np.random.default_rng([self._search.seed, len(trials), sum(trial.trained for trial in trials)])

    def _new(self, trials: Sequence[TrialView], table: RungTable, forecasts: Array, num_new: int) -> NewTrial:
        random = self._random(trials)
        points = self._candidates(forecasts, random)
        vectors = self._forecaster.encode(points)
        outlook = self._forecaster.of_points(vectors)
        level = self._first_level(outlook, len(trials))
        until, known = self._rungs[level], outlook.information[level]
        reason = f"new configuration: epoch {until} reveals {known:.0%} of what decides the final score"
        if self._samples:
            return NewTrial(until, reason)
        if random.random() < RANDOM_SHARE:
            return NewTrial(until, f"{reason}, drawn at random", iter(points))
        sampled = outlook.mean + random.normal(size=len(points)) * self._spread(trials, vectors, outlook)
        sampled += PRIOR_WEIGHT / len(trials) * self._encoding.prior_log_density(points, PRIOR_SHARE)
        order = np.argsort(-sampled)
        return NewTrial(until, reason, self._by_cost(points, sampled, order, num_new))

    def _candidates(self, forecasts: Array, random: np.random.Generator) -> list[dict[str, Value]]:
        """Draw random points, and points near the trials with the best forecasts."""
        best = np.argsort(-forecasts, kind="stable")[:NUM_BEST]
        near = self._forecaster.vectors[random.choice(best[np.isfinite(forecasts[best])], NUM_NEAR)]
        changes = random.normal(size=near.shape) * random.choice(STEPS, size=(NUM_NEAR, 1))
        near = np.clip(near + changes * (random.random(near.shape) < 0.5), 0, 1)
        return [*self._encoding.sample(NUM_DRAWN, random, PRIOR_SHARE), *self._encoding.decode(near)]

    def _first_level(self, outlook: Outlook, num_trials: int) -> int:
        """Index of the rung up to which an epoch reveals the most about the final score."""
        level = int(np.argmax((outlook.information / self._rungs)[:-1])) if len(self._rungs) > 1 else 0
        return level if num_trials >= NUM_CAUTIOUS else min(level, 1)

    def _spread(self, trials: Sequence[TrialView], vectors: Array, outlook: Outlook) -> Array:
        """Standard deviations of the forecasts; small near trials that train but have no score yet."""
        rows = [row for row, trial in enumerate(trials) if trial.status is TrialStatus.RUNNING and not trial.scores]
        variance = outlook.variance
        if rows:
            near = self._forecaster.similarity(vectors, self._forecaster.vectors[rows]).max(1)
            variance = variance * np.maximum(1 - near**2, 0.02)
        return np.asarray(np.sqrt(variance))

    def _by_cost(
        self, points: list[dict[str, Value]], sampled: Array, order: NDArray[np.intp], num_new: int
    ) -> Iterator[dict[str, Value]]:
        """Yield points, best first; the best few by their gain over an average point per cost of an epoch.

        The cost counts in full at first and no longer at the end (cost cooling, arXiv 2003.10870).
        """
        best = order[:NUM_COSTED]
        costs = [self._epoch_cost(points[index]) for index in best]
        exponent, average = num_new / self._search.num_trials, float(np.median(sampled))
        gains = [
            (sampled[index] - average) / cost**exponent if cost else -np.inf
            for index, cost in zip(best, costs, strict=True)
        ]
        for index in [*best[np.argsort(-np.array(gains), kind="stable")], *order[NUM_COSTED:]]:
            yield points[index]

    def describe(self) -> list[str]:
        """Explain the rungs, and how many configurations are looked at and finished."""
        rungs, ratio, total = self._rungs, self._search.reduction, self._search.num_trials
        if len(rungs) == 1:
            return [
                f"Each of {total} configurations is trained to its end, as there is no rung below epoch {rungs[0]}."
            ]
        epochs = ", ".join(map(str, rungs[:-1]))
        kept = [max(1, total // ratio**level) for level in range(1, len(rungs))]
        trained = rungs[0] * total + sum(n * (b - a) for n, a, b in zip(kept, rungs, rungs[1:], strict=False))
        return [
            f"Trials pause after epoch {epochs} (rungs); the best 1/{ratio} of each rung continue, the others keep their "
            f"checkpoints and may continue later.",
            f"Of {total} configurations about {kept[-1]} are trained to epoch {rungs[-1]}; all together train about "
            f"{trained:,} epochs, in place of {total * rungs[-1]:,} without pauses.",
            "The first rung of a new configuration, and what counts as good, follow from a model of the scores so far.",
        ]


def _ranks(values: Array) -> Array:
    """Ranks from 0 for the largest value."""
    return np.asarray(np.argsort(np.argsort(-values, kind="stable"), kind="stable"))
