"""A search stops cleanly on signals and with its budget, whatever it waits for, and not because of a log or a file."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.search import Searcher
from rich.console import Console

from csmae.cluster.resources import Allocation
from csmae.cluster.session import SETTINGS
from csmae.console.live_view import LiveView
from csmae.console.progress import SearchProgress
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.driver import run_search
from csmae.tuning.events import SearchEnd, SearchOutcome
from csmae.tuning.searcher import StudySearcher
from csmae.tuning.stop_controller import StopController, raise_on_termination
from tests.tuning.test_searcher import make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")


@pytest.fixture(autouse=True)
def _handled_hangup() -> Iterator[None]:
    """Handle SIGHUP even if the tests run under ``nohup``, from which they inherit that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def without_resources(folder: Path, **search: Any) -> tuple[StudySearcher, StopController]:
    budget = Budget(TrialStore(make_study(folder, **search), folder))
    searcher = StudySearcher(budget, lambda event: None, lambda: 0)
    return searcher, StopController(budget, searcher)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_a_search_that_waits_for_resources(tmp_path: Path, number: signal.Signals) -> None:
    searcher, stop_controller = without_resources(tmp_path)
    with stop_controller.stop_on_signals():
        assert searcher.suggest("a") is None
        os.kill(os.getpid(), number)
        assert searcher.suggest("a") == Searcher.FINISHED
    assert stop_controller.search_end == SearchEnd(SearchOutcome.INTERRUPTED)


def test_an_exhausted_budget_stops_a_search_that_waits_for_resources(tmp_path: Path) -> None:
    searcher, stop_controller = without_resources(tmp_path, time_limit="0.2s")
    assert searcher.suggest("a") is None
    time.sleep(0.2)
    assert searcher.suggest("a") == Searcher.FINISHED
    assert stop_controller.search_end == SearchEnd(SearchOutcome.BUDGET_EXHAUSTED, "the time limit of 0.2s is reached")


def test_a_second_interrupt_raises_keyboard_interrupt(tmp_path: Path) -> None:
    _, stop_controller = without_resources(tmp_path)
    with stop_controller.stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_hangup_that_nohup_ignores_stops_nothing(tmp_path: Path) -> None:
    _, stop_controller = without_resources(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_controller.stop_on_signals(), raise_on_termination():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop_controller.search_end == SearchEnd(SearchOutcome.COMPLETED)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_or_after_the_trials_raises_keyboard_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), raise_on_termination():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_tune_is_stopped_in_seconds_while_it_waits_for_a_trial(tmp_path: Path, number: signal.Signals) -> None:
    os.environ.update(SETTINGS)
    ray.init(num_cpus=0, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        budget = Budget(TrialStore(make_study(tmp_path), tmp_path))
        sent_at: list[float] = []

        def send() -> None:
            sent_at.append(time.monotonic())
            os.kill(os.getpid(), number)

        timer = threading.Timer(8, send)
        timer.start()
        assert run_search(budget, Allocation(0, 1, 1.0, 0.0), lambda event: None) == SearchEnd(
            SearchOutcome.INTERRUPTED
        )
        assert time.monotonic() - sent_at[0] < 8
    finally:
        ray.shutdown()


def test_a_log_that_cannot_be_written_does_not_stop_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    budget = Budget(TrialStore(make_study(tmp_path), tmp_path))
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails as well
    live_view = LiveView(SearchProgress(budget), Console(file=full))
    searcher = StudySearcher(budget, live_view, lambda: 1)
    assert isinstance(searcher.suggest("a"), dict)
    searcher.on_trial_complete("a", result(4, 0.5, finished=True))
    assert isinstance(searcher.suggest("b"), dict)
    assert searcher.search_end is None
    with suppress(OSError):
        full.close()
    assert [trial.state.name for trial in budget.trial_store.trials()] == ["COMPLETE", "RUNNING"]
    assert "No space left on device" in caplog.text
