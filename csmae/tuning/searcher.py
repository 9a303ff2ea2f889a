"""Ray Tune's searcher on top of the trial store: proposes trials and records what they report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
from ray.tune.search import Searcher

from csmae.config import Config
from csmae.trials.budget import Budget
from csmae.trials.database import DATABASE_ERRORS, describe_database_error
from csmae.trials.leaderboard import leaderboard, violated_constraints
from csmae.trials.optuna_private import frozen_trial
from csmae.trials.trial import (
    assignments,
    confirmed_number,
    curve,
    is_never_stopped,
    last_value,
    num_epochs,
    parent_number,
    status_of,
)
from csmae.tuning.events import (
    EpochReported,
    Listener,
    SearchEnd,
    SearchOutcome,
    TrialEnded,
    TrialPaused,
    TrialStarted,
    TrialWaiting,
)
from csmae.tuning.planner import Planner
from csmae.tuning.proposals import Proposal
from csmae.tuning.retention import CheckpointRetention
from csmae.tuning.strategy.base import Stop, Strategy
from csmae.tuning.strategy.make import make_strategy
from csmae.tuning.trial_checks import (
    NUM_FIRST,
    FirstTrialsCheck,
    measured_violations,
    missing_result,
    record_constraints,
    unreported_metric,
)
from csmae.workers.messages import Outcome
from csmae.workers.trial_files import saved_epoch

METRICS = "metrics/"
"""Prefix of an epoch's metrics in Tune's flattened result."""

PAUSING = ("auto",)
"""Strategies that resume paused trials."""

TRAINABLE_DIED = "the trainable's process repeatedly died or could not start"


@dataclass
class _RunningTrial:
    trial: optuna.Trial
    config: Config
    epoch: int
    """The last epoch with recorded scores, or of this assignment."""
    reason: str
    """Why it was proposed or resumed."""
    latest: dict[str, float]
    """The last value of each metric: scores are computed only every ``eval.every`` epochs."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last epoch."""


class StudySearcher(Searcher):  # type: ignore[misc]
    """Proposes what is trained next and records epochs, pauses and ends in the trial store. Runs in the driver.

    A trial of Tune is an assignment: a piece of the training of one of the study's trials.

    Args:
        budget: The study's budget, with its trial store.
        listener: Called with every event after it is recorded.
        max_concurrent: Returns how many trials may run at the moment.
        strategy: Decides what is trained next, and when a trial stops; by default the one that the study names.
    """

    def __init__(
        self,
        budget: Budget,
        listener: Listener,
        max_concurrent: Callable[[], int],
        strategy: Strategy | None = None,
    ) -> None:
        super().__init__()
        self._budget, self._trial_store, self._search = budget, budget.trial_store, budget.trial_store.study.search
        self._listener, self._max_concurrent = listener, max_concurrent
        self._planner = Planner(self._trial_store, strategy or make_strategy(self._trial_store.study))
        self.retention = CheckpointRetention(self._trial_store)
        self._running: dict[str, _RunningTrial] = {}
        self._retried: set[int] = set()
        """Numbers of the trials that were proposed again after Tune gave them up."""
        self._reported: set[str] = set()
        """Names of the metrics that some epoch has reported."""
        self._first_trials = FirstTrialsCheck(enabled=not leaderboard(self._trial_store.optuna_study).ranked)
        self.search_end: SearchEnd | None = None
        """Set if the search must stop: it cannot succeed, or its storage failed."""
        self.must_stop: Callable[[], bool] = lambda: False
        """Checked before each proposal: while no trial runs, Tune waits up to ten minutes for one and checks nothing else."""

    @property
    def end_reason(self) -> str:
        """Why the search ends although the study may have more trials; empty if it has all of them."""
        return self._planner.end_reason

    @property
    def _storage_failed(self) -> bool:
        return self.search_end is not None and self.search_end.outcome is SearchOutcome.STORAGE_FAILED

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: the trial store holds all state, and Tune's snapshots are not used."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing, for the same reason."""

    @contextmanager
    def stop_on_database_error(self) -> Iterator[None]:
        """Stop the search if the database fails inside the block; trials keep their recorded state."""
        try:
            yield
        except DATABASE_ERRORS as error:
            self.search_end = SearchEnd(
                SearchOutcome.STORAGE_FAILED, describe_database_error(self._trial_store.path, error)
            )

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Propose a trial, or a paused one to resume.

        Returns:
            The assignment for Tune: the trial's number, configuration and folder, and the epoch after which it pauses. None if Tune must ask again later: no resources are free, a running trial may
            have to be proposed again, or the finalists are not known yet. ``FINISHED`` ends the search.
        """
        if self.must_stop():
            return str(Searcher.FINISHED)
        if len(self._running) >= self._max_concurrent():
            return None
        with self.stop_on_database_error():
            proposal = self._next_proposal()
            if proposal:
                return self._start(trial_id, proposal)
            if self._running:
                return None
        return str(Searcher.FINISHED)

    def _next_proposal(self) -> Proposal | None:
        while isinstance(decision := self._planner.next(bool(self._running)), Stop):
            self._stop_paused(decision)
        if self.end_reason and not self._trial_store.explored():
            self._abort(self.end_reason)
        return decision

    def _stop_paused(self, decision: Stop) -> None:
        """End a paused trial for good."""
        trial = self._trial_store.paused_trial(decision.number)
        record_constraints(trial, self._trial_store.last_metrics(trial), self._search.constraints)
        self._trial_store.stop(trial, decision.reason)
        self.retention.remove_unneeded()
        self._report_end(trial, {self._search.objective: last_value(frozen_trial(trial))}, decision.reason)

    def _start(self, trial_id: str, proposal: Proposal) -> dict[str, Any]:
        trial, config, until, reason = proposal.trial, proposal.config, proposal.until, proposal.reason
        stored, latest = frozen_trial(trial), dict(self._trial_store.last_metrics(trial))
        epoch, promoted = max(curve(stored), default=0), len(assignments(stored)) > 1
        self._running[trial_id] = _RunningTrial(trial, config, epoch, reason, latest)
        self._first_trials.start(trial.number)
        self._budget.begin(trial)
        epochs = config.train.epochs
        self._listener(TrialStarted(trial.number, proposal.values, epochs, proposal.resumed, promoted, until, reason))
        parent = parent_number(trial)
        return {
            "number": trial.number,
            "never_stop": is_never_stopped(trial),
            "run_dir": str(self._trial_store.run_dir(trial.number)),
            "config": config.model_dump(mode="json"),
            "until": until,
            "parent_dir": None if parent is None else str(self._trial_store.run_dir(parent)),
        }

    def should_continue(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether a trial continues after a result; asking again repeats the decision.

        Starting points always continue, but the others are compared with their scores. Confirmations are no part of that.
        Results without scores, or with scores that are not finite, stop no trial.
        """
        trial = self._running[trial_id].trial
        values = [result.get(METRICS + name, math.nan) for name in self._search.objectives]
        if confirmed_number(trial) is not None or "epoch" not in result or not all(map(math.isfinite, values)):
            return True
        return self._planner.should_continue(trial.number, result["epoch"], values) or is_never_stopped(trial)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Record an epoch, once, and whether the trial's workers hold resources."""
        running, epoch = self._running[trial_id], result.get("epoch")
        if Outcome.STORAGE_FAILED in result:
            self.search_end = SearchEnd(SearchOutcome.STORAGE_FAILED, result[Outcome.STORAGE_FAILED])
        if "resources_held" in result and not self._storage_failed:
            with self.stop_on_database_error():
                self._budget.hold(running.trial, result["resources_held"])
        if epoch is None or self._storage_failed:
            return
        running.metrics = {key.removeprefix(METRICS): value for key, value in result.items() if key.startswith(METRICS)}
        running.latest |= running.metrics
        self._reported |= running.metrics.keys()
        scored = epoch % running.config.eval.every == 0 or epoch == running.config.train.epochs
        if name := unreported_metric(self._reported, self._search, scored):
            self._abort(f"no epoch reports {name!r}")
        if epoch > running.epoch:
            with self.stop_on_database_error():
                self._record_epoch(running, epoch)

    def _abort(self, reason: str) -> None:
        self.search_end = self.search_end or SearchEnd(SearchOutcome.ABORTED, reason)

    def _record_epoch(self, running: _RunningTrial, epoch: int) -> None:
        running.epoch = epoch
        scored = all(name in running.metrics for name in self._search.objectives)
        if scored:
            self._trial_store.record_last_metrics(running.trial, running.latest)
        self._trial_store.record_epoch(running.trial, epoch, self._objectives(running) if scored else ())
        self._listener(EpochReported(running.trial.number, epoch, running.metrics))

    def _objectives(self, running: _RunningTrial) -> tuple[float, ...]:
        return tuple(running.metrics[name] for name in self._search.objectives)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended or paused; one without resources, or whose process died once, is proposed again."""
        result = result or {}
        self.on_trial_result(trial_id, result)
        running = self._running.pop(trial_id)
        number = running.trial.number
        if self._storage_failed:
            return
        with self.stop_on_database_error():
            if Outcome.UNSCHEDULABLE in result:
                self._requeue(running)
                self._listener(TrialWaiting(number, result[Outcome.UNSCHEDULABLE]))
            elif error and number not in self._retried:
                self._retried.add(number)  # Tune does not try another trainable if one died between two trials
                self._requeue(running)
            elif Outcome.PAUSED in result:
                self._pause(running)
            else:
                failure = TRAINABLE_DIED if error else result.get(Outcome.FAILED)
                self._end(running, failure, Outcome.FINISHED in result)

    def _requeue(self, running: _RunningTrial) -> None:
        self._budget.end(running.trial)
        self._trial_store.requeue(running.trial)

    def _pause(self, running: _RunningTrial) -> None:
        self._budget.end(running.trial)
        violations = measured_violations(running.latest, self._search.constraints)
        self._trial_store.pause(running.trial, running.epoch, violations)
        self._first_trials.end(running.trial.number, None)
        self.retention.limit_disk(self._planner.expectation)
        self._listener(TrialPaused(running.trial.number, running.epoch, running.reason))

    def _end(self, running: _RunningTrial, failure: str | None, finished: bool) -> None:
        trial = running.trial
        failure = failure or (missing_result(running.metrics, self._search) if finished else None)
        self._budget.end(trial)
        self._trial_store.record_num_epochs(trial, running.epoch)
        if failure:
            self._trial_store.fail(trial, failure)
        else:
            record_constraints(trial, running.latest, self._search.constraints)
            if finished:
                self._trial_store.complete(trial, self._objectives(running))
            else:
                self._trial_store.stop(trial, f"stopped by {self._search.strategy} after epoch {running.epoch}")
        common = self._first_trials.end(trial.number, failure)
        if common and not any(other.epoch for other in self._running.values()):
            self._abort(f"the first {NUM_FIRST} trials all failed: {common}")
        self.retention.remove_unneeded()
        self.retention.limit_disk(self._planner.expectation)
        self._report_end(trial, running.latest, failure)

    def _report_end(self, trial: optuna.Trial, latest: Mapping[str, float], reason: str | None) -> None:
        frozen = frozen_trial(trial)
        value, confirms = latest.get(self._search.objective), confirmed_number(frozen)
        self._listener(
            TrialEnded(frozen.number, status_of(frozen), value, reason, confirms, violated_constraints(frozen))
        )

    def cut_short_trials(self, reason: str) -> None:
        """End all running and interrupted trials, without removing their checkpoints.

        Trials with a score are paused if the strategy resumes paused trials, else PRUNED; the others wait until the study
        resumes. Paused trials stay paused.
        """
        for running in self._running.values():
            self._budget.end(running.trial)
            self._cut_short(running.trial, running.epoch, running.latest, reason)
        self._running.clear()
        while self._trial_store.num_interrupted:
            trial = self._trial_store.next_interrupted()
            epoch, metrics = saved_epoch(self._trial_store.run_dir(trial.number)) or (0, {})
            self._cut_short(trial, epoch, {**self._trial_store.last_metrics(trial), **metrics}, reason)

    def _cut_short(self, trial: optuna.Trial, epoch: int, latest: Mapping[str, float], reason: str) -> None:
        self._trial_store.record_num_epochs(trial, epoch)
        has_result = self._trial_store.has_result(trial)
        if has_result and self._search.strategy in PAUSING:
            violations = measured_violations(latest, self._search.constraints, cut_short=True)
            epoch = num_epochs(frozen_trial(trial))
            self._trial_store.pause(trial, epoch, violations)
            self._listener(TrialPaused(trial.number, epoch, reason))
            return
        if has_result:
            record_constraints(trial, latest, self._search.constraints, cut_short=True)
        self._trial_store.cut_short(trial, reason)
        if has_result:
            self._report_end(trial, latest, reason)
        else:
            self._listener(TrialWaiting(trial.number, reason))
