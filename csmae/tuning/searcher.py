"""Between Tune, which executes, and the ledger, which remembers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
from ray.tune.search import Searcher

from csmae.config import Config
from csmae.study.metrics import COSTS, TERMS, due
from csmae.trials.attributes import CONFIRMS, START
from csmae.trials.budget import Budget
from csmae.trials.constraints import violation
from csmae.trials.database import DATABASE_ERRORS, unusable
from csmae.trials.leaderboard import violated_constraints
from csmae.trials.trial import curve, state_of
from csmae.tuning.events import (
    EpochReported,
    Listener,
    SearchEnd,
    SearchOutcome,
    TrialEnded,
    TrialStarted,
    TrialWaiting,
)
from csmae.tuning.proposals import Proposal, Proposals
from csmae.tuning.retention import CheckpointRetention
from csmae.workers.trial_files import saved_epoch

METRICS = "metrics/"
"""Prefix of an epoch's metrics in a flattened result."""

NUM_ALIKE = 3
"""First trials, in the order in which they start, that must fail for the same reason before the search ends."""


@dataclass
class _Live:
    trial: optuna.Trial
    epoch: int
    config: Config
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last epoch."""
    latest: dict[str, float] = field(default_factory=dict)
    """Each metric's last value: scores come every ``eval.every`` epochs."""


class StudySearcher(Searcher):  # type: ignore[misc]
    """Proposes what the ledger holds next and writes down how each trial ends.

    Args:
        budget: Counts what the study's trials spend.
        listener: Told of every event after it is on record.
        capacity: How many trials may run at the moment.
    """

    def __init__(self, budget: Budget, listener: Listener, capacity: Callable[[], int] | None = None) -> None:
        super().__init__()
        self._capacity = capacity
        self._trial_store, self._budget, self._listener = budget.trial_store, budget, listener
        trial_store = self._trial_store
        self._proposals, self.retention = Proposals(trial_store), CheckpointRetention(trial_store)
        self._live: dict[str, _Live] = {}
        self._put_back: set[int] = set()
        """Trials that were proposed once more after Tune gave them up."""
        self._reported: set[str] = set()
        """Metrics that some trial has reported."""
        self._confirming = False
        self.exhausted: str | None = None
        """Why fewer trials were proposed than the study asks for."""
        self._first: dict[int, str | None] | None = {} if not trial_store.ranked() else None
        """By number, the first trials that start and why each failed, if it did; None once a trial has ended well."""
        self.search_end: SearchEnd | None = None
        """Why it makes no sense to go on, or is impossible."""
        self.must_stop: Callable[[], bool] = lambda: False
        """Whether the search is to end; asked before each proposal, for Tune waits up to ten minutes for one while no trial
        is live, and asks nobody else."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the ledger is what lasts, and Tune's own snapshots are not used."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    # Tune asks.

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """What the slot gets: number, whether it is a starting point, folder and configuration.

        None asks Tune to come again later: there is no room now, a trial that runs may have to be proposed once more, or the
        best are known when all are over.
        """
        if self.must_stop():
            return str(Searcher.FINISHED)
        if self._capacity and len(self._live) >= self._capacity():
            return None
        with self.stop_on_database_error():
            return self._suggest(trial_id)
        return str(Searcher.FINISHED)

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal = self._next()
        if proposal is None:
            return None if self._live else str(Searcher.FINISHED)
        trial, config = proposal.trial, proposal.config
        done = max(curve(self._trial_store.frozen(trial)), default=0)
        self._live[trial_id] = _Live(trial, done, config, latest=dict(self._trial_store.measured(trial)))
        if self._first is not None and len(self._first) < NUM_ALIKE:
            self._first.setdefault(trial.number, None)
        self._budget.begin(trial)
        self._listener(TrialStarted(trial.number, proposal.values, config.train.epochs, proposal.resumed))
        return {
            "number": trial.number,
            "start": START in trial.user_attrs,
            "run_dir": str(self._trial_store.run_dir(trial.number)),
            "config": config.model_dump(mode="json"),
        }

    def _next(self) -> Proposal | None:
        while self._trial_store.num_interrupted:
            if proposal := self._proposals.left():
                return proposal
        if self.exhausted is None and (proposal := self._new()):
            return proposal
        if self._live and not self._confirming:
            return None
        self._confirming = True
        return self._proposals.confirmation()

    def _new(self) -> Proposal | None:
        """A trial that the study still lacks, if there is one to be found."""
        lacking = self._trial_store.study.search.num_trials - len(self._trial_store.explored())
        if lacking <= 0:
            return None
        proposal = self._proposals.new()
        if proposal is None:
            self.exhausted = f"the space has nothing left to train: {self._proposals.reason}"
            if not self._trial_store.explored():
                self.search_end = SearchEnd(SearchOutcome.ABORTED, self.exhausted)
        return proposal

    # Tune tells.

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Write down an epoch, once."""
        live, epoch = self._live[trial_id], result.get("epoch")
        if "stuck" in result:
            self.search_end = SearchEnd(SearchOutcome.STORAGE_FAILED, result["stuck"])
        if "holding" in result and not self._storage_failed:
            with self.stop_on_database_error():
                self._budget.hold(live.trial, result["holding"])
        if epoch is None or self._storage_failed:
            return
        live.metrics = {key.removeprefix(METRICS): value for key, value in result.items() if key.startswith(METRICS)}
        live.latest |= live.metrics
        self._check_names(live, epoch)
        if epoch > live.epoch:
            with self.stop_on_database_error():
                self._record(live, epoch)

    def _record(self, live: _Live, epoch: int) -> None:
        live.epoch = epoch
        objectives = self._trial_store.study.search.objectives
        if all(name in live.metrics for name in objectives):
            self._trial_store.record_measured(live.trial, live.latest)
            self._trial_store.record_epoch(live.trial, epoch, tuple(live.metrics[name] for name in objectives))
        self._listener(EpochReported(live.trial.number, epoch, live.metrics))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Write down how a trial ended: to its end, stopped by the scheduler, or failed; one without room has not."""
        result = result or {}
        self.on_trial_result(trial_id, result)
        failed = "the slot's process died or could not start, again and again" if error else result.get("failed")
        live = self._live.pop(trial_id)
        if self._storage_failed:
            return
        with self.stop_on_database_error():
            if "roomless" in result:
                self._again(live)
                self._listener(TrialWaiting(live.trial.number, result["roomless"]))
            elif error and live.trial.number not in self._put_back:
                self._put_back.add(live.trial.number)  # Tune tries no other slot where one died between two trials
                self._again(live)
            else:
                self._end(live, failed, "finished" in result)

    def _again(self, live: _Live) -> None:
        """Put a trial back, to be proposed once more."""
        self._budget.end(live.trial)
        self._trial_store.requeue(live.trial)

    @property
    def _storage_failed(self) -> bool:
        return self.search_end is not None and self.search_end.outcome is SearchOutcome.STORAGE_FAILED

    @contextmanager
    def stop_on_database_error(self) -> Iterator[None]:
        """A database that fails ends the search; its trials stay as the ledger last heard of them."""
        try:
            yield
        except DATABASE_ERRORS as error:
            self.search_end = SearchEnd(SearchOutcome.STORAGE_FAILED, unusable(self._trial_store.path, error))

    def cut_short_trials(self, reason: str) -> None:
        """End the trials that run, or were left in the middle; their checkpoints stay.

        Those with a result count as stopped early, the others wait.
        """
        for live in self._live.values():
            self._budget.end(live.trial)
            self._cut(live, reason)
        self._live.clear()
        any_config = self._trial_store.study.resolve({})  # nothing is read from it any more
        while self._trial_store.num_interrupted:
            trial = self._trial_store.next_interrupted()
            epoch, metrics = saved_epoch(self._trial_store.run_dir(trial.number)) or (0, {})
            self._cut(
                _Live(trial, epoch, any_config, metrics, {**self._trial_store.measured(trial), **metrics}), reason
            )

    def _cut(self, live: _Live, reason: str) -> None:
        counts = self._trial_store.has_result(live.trial)
        if counts:
            self._judge(live)
            known = {*COSTS, *self._trial_store.frozen(live.trial).constraints}
            for name in self._trial_store.study.search.constraints.keys() - known:
                live.trial.set_constraint(name, math.inf)  # nobody knows whether it was kept
        self._trial_store.cut_short(live.trial, reason)
        if counts:
            self._tell(live, reason)
        else:
            self._listener(TrialWaiting(live.trial.number, reason))

    def _end(self, live: _Live, failed: str | None, finished: bool) -> None:
        failed = failed or (self._missing(live) if finished else None)
        self._budget.end(live.trial)
        if failed:
            self._trial_store.fail(live.trial, failed)
        else:
            self._judge(live)
            if finished:
                self._trial_store.complete(live.trial, self._values(live))
            else:
                self._trial_store.prune(live.trial)
        self._check_first(live.trial.number, failed)
        self.retention.remove_unneeded()
        self._tell(live, failed)

    def _tell(self, live: _Live, reason: str | None) -> None:
        trial = self._trial_store.frozen(live.trial)
        value = live.latest.get(self._trial_store.study.search.objective)
        confirms = trial.user_attrs.get(CONFIRMS)
        self._listener(TrialEnded(trial.number, state_of(trial), value, reason, confirms, violated_constraints(trial)))

    def _values(self, live: _Live) -> tuple[float, ...]:
        return tuple(live.metrics[name] for name in self._trial_store.study.search.objectives)

    def _check_names(self, live: _Live, epoch: int) -> None:
        """End the search where an objective or a constraint names what no trial reports, at the first epoch that should."""
        self._reported |= live.metrics.keys()
        scored = epoch % live.config.eval.every == 0 or epoch == live.config.train.epochs
        search = self._trial_store.study.search
        for name in [*search.objectives, *search.constraints]:
            if due(name, scored) and name not in self._reported:
                self.search_end = self.search_end or SearchEnd(SearchOutcome.ABORTED, f"no epoch reports {name!r}")

    def _missing(self, live: _Live) -> str | None:
        """Why a trial that came to its end has no result."""
        search = self._trial_store.study.search
        for name in [*search.objectives, *search.constraints]:
            if name not in live.metrics and due(name, scored=True):
                return f"{name} was not reported"
            if not math.isfinite(live.metrics.get(name, 0.0)):
                return f"{name} was {live.metrics[name]} at the end"
        return None

    def _judge(self, live: _Live) -> None:
        """Write down how the last metrics stand to the constraints; a loss term that is not computed breaks none."""
        for name, wanted in self._trial_store.study.search.constraints.items():
            if name in live.latest:
                value = live.latest[name]
                live.trial.set_constraint(name, violation(value, wanted) if math.isfinite(value) else math.inf)
            elif name in TERMS and live.latest:
                live.trial.set_constraint(name, 0.0)

    def _check_first(self, number: int, failed: str | None) -> None:
        """End the search where the first trials all failed for the same reason, and none that runs has done an epoch."""
        if self._first is None:
            return
        if failed is None:
            self._first = None
            return
        if number in self._first:
            self._first[number] = failed
        reasons = [reason for reason in self._first.values() if reason is not None]
        alike = len(reasons) == NUM_ALIKE and len({re.sub(r"\d+", "", reason) for reason in reasons}) == 1
        if alike and not any(live.epoch for live in self._live.values()):
            self.search_end = SearchEnd(
                SearchOutcome.ABORTED, f"the first {NUM_ALIKE} trials all failed: {reasons[-1]}"
            )
