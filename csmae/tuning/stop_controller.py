"""When a search stops: signals, the budget, and searches that cannot continue."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray.tune import Stopper

from csmae.trials.budget import Budget
from csmae.tuning.events import SearchEnd, SearchOutcome
from csmae.tuning.searcher import StudySearcher


class StopController(Stopper):  # type: ignore[misc]
    """Tune's stopper of a whole search, in the driver; single trials are stopped by the strategy.

    It stops the search at the first Ctrl-C, SIGTERM or SIGHUP, when the budget is exhausted, when another driver takes over
    the storage, and when the searcher asks for it. A second Ctrl-C raises ``KeyboardInterrupt``.
    """

    def __init__(self, budget: Budget, searcher: StudySearcher) -> None:
        self._budget, self._searcher = budget, searcher
        searcher.must_stop = self.stop_all
        self.search_end = SearchEnd(SearchOutcome.COMPLETED)
        """COMPLETED until something stops the search."""

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune's snapshots are not used."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the search must stop; Tune calls this several times a second."""
        if self.search_end.outcome is SearchOutcome.COMPLETED:
            if self._searcher.search_end:
                self.search_end = self._searcher.search_end
            elif (remote := self._budget.trial_store.remote) and remote.claim.superseded:
                self.search_end = SearchEnd(SearchOutcome.SUPERSEDED, remote.claim.superseded)
            elif reason := self._budget.reached_limit():
                self.search_end = SearchEnd(SearchOutcome.BUDGET_EXHAUSTED, reason)
            else:
                with self._searcher.stop_on_database_error():
                    self._budget.tick()
        return self.search_end.outcome is not SearchOutcome.COMPLETED

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Stop the search on SIGINT, SIGTERM and SIGHUP inside the block."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.search_end = SearchEnd(SearchOutcome.INTERRUPTED)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        with _handle_signals(stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            yield


@contextmanager
def raise_on_termination() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGTERM and SIGHUP inside the block, so that open resources are closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handle_signals(interrupt, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def _handle_signals(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Install a signal handler inside the block; a SIGHUP that ``nohup`` ignores stays ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
