"""What is trained next: an interrupted trial, a starting point, what the strategy decides, or a confirmation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csmae.trials.pareto import as_scores
from csmae.trials.store import TrialStore
from csmae.tuning.observations import Observations
from csmae.tuning.proposals import Proposal, Proposals
from csmae.tuning.stop_when import StopWhen
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, Stop, Strategy


class Planner:
    """Decides what a study trains next, from the trial store alone. Knows neither Ray nor a clock.

    Args:
        trial_store: Of the study.
        strategy: Has seen no trial yet.
    """

    def __init__(self, trial_store: TrialStore, strategy: Strategy) -> None:
        self._trial_store, self._search, self._strategy = trial_store, trial_store.study.search, strategy
        self._proposals, self._observations = Proposals(trial_store), Observations(trial_store)
        self._idle: tuple[object, int] | None = None
        """What the strategy saw when it last had nothing to do, so that it is not asked again before something changes."""
        self._confirming = False
        self._stop_when, self._exhausted_reason = StopWhen(trial_store), ""
        self.end_reason = ""
        """Why no further configurations are trained although the study may have more trials: its space has none, or
        ``search.stop_when``."""
        for view in self._observations.views():
            for epoch, scores in view.scores.items():
                strategy.should_continue(view.number, epoch, scores)

    def next(self, any_running: bool) -> Proposal | Stop | None:
        """Decide what to do next.

        Args:
            any_running: Whether a trial runs, so that there may be more to do once it reports.

        Returns:
            A trial to train, or a paused one to stop. None if there is nothing to do before a running trial reports; if none
            runs, the study is complete.
        """
        while self._trial_store.num_interrupted:
            if proposal := self._proposals.interrupted():
                return proposal
        members_pause = self._search.strategy == "pbt"  # starting points are members of the population like others
        if self._num_new() and not members_pause and (proposal := self._proposals.starting_point()):
            return proposal
        while decision := self._decide():
            if isinstance(decision, Stop):
                return decision
            if done := self._resume(decision) if isinstance(decision, Resume) else self._train_new(decision):
                return done
        if any_running and not self._confirming:
            return None
        self._confirming = True
        return self._proposals.confirmation()

    def _num_new(self) -> int:
        """Count the further configurations that may be trained, and find out why there are none."""
        num_left = max(0, self._search.num_trials - len(self._trial_store.explored()))
        self.end_reason = self._exhausted_reason or self._stop_when.reason(self._observations.views())
        if not num_left:
            self.end_reason = ""
        return 0 if self.end_reason else num_left

    def _decide(self) -> Decision | None:
        seen = self._observations.views(), self._num_new()
        if self._idle and self._idle[0] is seen[0] and self._idle[1] == seen[1]:
            return None
        decision = self._strategy.next(*seen)
        self._idle = None if decision else seen
        return decision

    def _resume(self, decision: Resume) -> Proposal | Stop:
        """Resume a paused trial, or stop it if the search's present settings do not allow its configuration."""
        proposal = self._proposals.paused(decision.number, decision.until, decision.reason)
        return proposal or Stop(decision.number, f"not allowed any more: {self._proposals.rejection_reason}")

    def _train_new(self, decision: NewTrial) -> Proposal | None:
        """Train a new configuration; None if there is none left, or the strategy's points are rejected."""
        assert self._num_new() or decision.parent is not None, (
            "the strategy must propose no more trials than there may be"
        )
        proposal = self._proposals.new(decision)
        if proposal is None:
            reason = self._proposals.rejection_reason
            self._exhausted_reason = f"the space has no further point to train{f': {reason}' if reason else ''}"
        return proposal

    def should_continue(self, number: int, epoch: int, values: Sequence[float]) -> bool:
        """Whether the strategy lets a running trial continue after an epoch with finite objectives."""
        return self._strategy.should_continue(number, epoch, as_scores(values, self._search.signs))

    def expectation(self) -> Mapping[int, float]:
        """How likely the strategy is to resume each paused trial; larger is likelier."""
        return self._strategy.expectation(self._observations.views())
